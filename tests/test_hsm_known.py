"""Where PKCS#11 modules lie: p11-kit's list, also where a part of it cannot be read."""

from hsm_signer.hsm import known


def test_a_module_file_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    module = tmp_path / "libgood.so"
    module.touch()
    (tmp_path / "a.module").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.module").mkdir()
    (tmp_path / "c.module").write_text(f"module: {module}\n")
    monkeypatch.setattr(known, "P11_KIT_DIRECTORIES", [str(tmp_path)])
    assert module in known.known_modules()
