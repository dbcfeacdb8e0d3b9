"""Settings and the layers they come from."""

import os
import shlex
from pathlib import Path

import pytest

from hsm_signer import config, paths
from hsm_signer.errors import ConfigError, ModuleError

ENDPOINT = "https://login.example/token"


@pytest.fixture
def written(tmp_path):
    def write(text: str, mode: int = 0o600) -> dict[str, object]:
        path = tmp_path / "config.toml"
        path.write_text(text)
        path.chmod(mode)
        return {"config": str(path)}

    return write


def load(options, environ=None):
    return config.load(options, environ or {})


def test_an_option_wins_over_environment_profile_preset_and_default(written):
    options = written('[profiles.a]\npreset = "wipo-das"\nscope = "from-profile"\nlifetime = 30\n')
    environ = {"HSM_TOKEN_LIFETIME": "20", "HSM_TOKEN_CLIENT_ID": "from-environment"}
    settings = load(options | {"client_id": "from-option"}, environ)
    found = {
        name: (getattr(settings, name), settings.origin(name))
        for name in ("client_id", "lifetime", "scope", "issuer", "deadline")
    }
    assert found == {
        "client_id": ("from-option", "option"),
        "lifetime": (20, "environment"),
        "scope": ("from-profile", "profile"),
        "issuer": ("https://www5.wipo.int/am/oauth2", "preset"),
        "deadline": (60.0, "default"),
    }


def test_an_empty_variable_counts_as_none(written):
    settings = load(written('[profiles.a]\nproxy = "http://proxy.example:3128"\n'), {"HSM_TOKEN_PROXY": ""})
    assert settings.proxy == "http://proxy.example:3128"


def test_every_optional_setting_has_its_variable():
    fitting = {
        "pin_source": "prompt",
        "lifetime": "1",
        "claims": "oidc",
        "token_endpoint": ENDPOINT,
        "issuer": ENDPOINT,
    }
    names = [name for name, each in config.SETTINGS.items() if each.metadata["option"]]
    settings = load({}, {config.variable(name): fitting.get(name, "x") for name in names})
    assert {settings.origin(name) for name in names} == {"environment"}


def test_the_only_profile_is_taken_and_of_several_the_default_one(written):
    assert load(written("[profiles.one]\nscope = 'x'\n")).profile == "one"
    assert load(written("[profiles.one]\n[profiles.default]\n")).profile == "default"
    settings = load(written("[profiles.one]\n[profiles.two]\n"))
    assert settings.profile is None
    with pytest.raises(ConfigError) as caught:
        settings.require("module")
    assert "--profile" in str(caught.value.hint)


def test_an_unknown_profile_is_an_error_that_names_those_there_are(written):
    with pytest.raises(ConfigError, match="no profile 'x'") as caught:
        load(written("[profiles.one]\n[profiles.two]\n") | {"profile": "x"})
    assert caught.value.hint == "profiles there: one, two"


def test_an_unknown_key_is_an_error_with_the_nearest_known_one(written):
    with pytest.raises(ConfigError, match="'client_id'") as caught:
        load(written("[profiles.a]\nclient_id = 'x'\n"))
    assert caught.value.hint == "did you mean client-id?"


def test_a_pin_in_the_file_is_refused_and_not_shown(written):
    with pytest.raises(ConfigError) as caught:
        load(written("[profiles.a]\npin = '31415926'\n"))
    assert "31415926" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("text", ["31415926", "banana:31415926"])
def test_what_is_no_pin_source_may_be_a_pin_and_is_not_shown(written, text):
    with pytest.raises(ConfigError, match="pin-source") as caught:
        load(written(f"[profiles.a]\npin-source = '{text}'\n"))
    assert "31415926" not in f"{caught.value} {caught.value.hint}"


def test_a_user_without_a_home_is_told_so(monkeypatch):
    monkeypatch.delenv("HOME")
    for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError()))
    with pytest.raises(ConfigError, match="no home directory"):
        load({})


def test_the_runtime_directory_has_the_cache_only_where_it_is_absolute_ours_and_private(
    monkeypatch, tmp_path
):
    def cache_with(runtime):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
        return paths.cache_directory()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    usual = tmp_path / "cache" / "hsm-token"
    runtime, file, link = (tmp_path / name for name in ("runtime", "file", "link"))
    runtime.mkdir(mode=0o700)
    file.touch(mode=0o600)
    link.symlink_to(runtime)
    monkeypatch.chdir(tmp_path)
    assert cache_with(runtime) == runtime / "hsm-token"
    for other in (link, file, tmp_path / "none", "runtime", ""):
        assert cache_with(other) == usual
    runtime.chmod(0o710)
    assert cache_with(runtime) == usual


@pytest.mark.parametrize(
    "line",
    [
        "lifetime = 'soon'",
        "lifetime = true",
        "clock-offset = -601",
        "scope = 5",
        "scope = ''",
        "verify = 1",
        "claims = 'all'",
        "timeout = [1, 2, 3]",
        "timeout = 0",
        "deadline = 'x'",
        "module-env = 'x'",
        "module-env = {A = 1}",
        "preset = 'wipo'",
        "preset = []",
        "sessions = 1.5",
        "module = 'libsofthsm2.so'",
        'module = "/lib/a\\u0000"',
        'ca-bundle = "a\\u0000"',
        'module-env = {"A=B" = "x"}',
        'module-env = {"" = "x"}',
        'module-env = {"A\\u0000" = "x"}',
        'module-env = {A = "x\\u0000"}',
        "typ = 5",
        "typ = ['JWT']",
        "lifetime = '" + "9" * 5000 + "'",
        "cache = ''",
        "state-dir = ''",
        "certificate = ''",
        "pin-source = ''",
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_key(written, line):
    with pytest.raises(ConfigError) as caught:
        load(written(f"[profiles.a]\n{line}\n"))
    assert line.split(" ")[0] in str(caught.value)


@pytest.mark.parametrize(
    "text", ["nonsense", "a = 1", "profiles = 1", "[profiles]\na = 1", "\udcff", "a = " + "[" * 10_000]
)
def test_a_file_that_is_no_configuration_is_an_error(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError):
        load({"config": str(path)})


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_refused(written, mode):
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load(written("[profiles.a]\n", mode))


def test_a_file_of_somebody_else_is_refused(written):
    options = written("[profiles.a]\n")
    os.chown(str(options["config"]), 65534, 65534)
    with pytest.raises(ConfigError):
        load(options)


def test_a_named_file_must_be_there_and_the_usual_one_need_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert load({}).config is None
    with pytest.raises(ConfigError, match="no configuration file"):
        load({"config": str(tmp_path / "none.toml")})


def test_a_file_that_cannot_be_read_is_an_error_with_the_systems_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot read .*: Not a directory"):
        load({"config": str(tmp_path / "file" / "config.toml")})


def test_the_working_directory_is_never_looked_into(tmp_path, monkeypatch):
    for name in ("hsm-token.toml", "config.toml", ".hsm-token.toml"):
        (tmp_path / name).write_text("[profiles.default]\nscope = 'hostile'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "empty"))
    assert load({}).scope is None


def test_paths_in_the_file_are_relative_to_it(written, tmp_path):
    settings = load(written("[profiles.a]\nca-bundle = 'ca.pem'\npin-source = 'file:pin'\ncache = '/abs'\n"))
    assert settings.ca_bundle == str(tmp_path / "ca.pem")
    assert settings.pin_source == f"file:{tmp_path}/pin"
    assert settings.cache == "/abs"


def test_an_empty_typ_leaves_it_out(written):
    assert load(written("[profiles.a]\ntyp = ''\n")).typ == ""


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("./getpin --for das", ["{}/getpin", "--for", "das"]),
        ("'bin/get pin' 'a b'", ["{}/bin/get pin", "a b"]),
        ("../getpin", ["{}/../getpin"]),
        ("pass show hsm/pin", ["pass", "show", "hsm/pin"]),
        ("/usr/bin/pass  'a b'", ["/usr/bin/pass", "a b"]),
    ],
)
def test_a_pin_command_of_the_file_is_not_one_of_the_working_directory(written, tmp_path, command, words):
    source = load(written(f'[profiles.a]\npin-source = "command:{command}"\n')).pin_source
    kind, _, found = str(source).partition(":")
    assert (kind, shlex.split(found)) == ("command", [word.format(tmp_path) for word in words])


def test_a_pin_command_that_is_no_command_stays_for_the_source_to_refuse(written):
    for source in ("command:'unclosed", "command:", "file:"):
        assert load(written(f'[profiles.a]\npin-source = "{source}"\n')).pin_source == source


def test_audience_of_another_server_from_another_layer_is_refused(written):
    elsewhere = "https://other.example/token"
    layers = {
        "option": ({"VALUE": None}, lambda name, value: ({name: value}, {}, "")),
        "environment": ({}, lambda name, value: ({}, {config.variable(name): value}, "")),
        "profile": ({}, lambda name, value: ({}, {}, f'{name.replace("_", "-")} = "{value}"\n')),
    }
    tried = 0
    for one, (_, first) in layers.items():
        for two, (_, second) in layers.items():
            a, b = first("token_endpoint", ENDPOINT), second("audience", elsewhere)
            options = a[0] | b[0] | written(f"[profiles.a]\n{a[2]}{b[2]}")
            settings = load(options, a[1] | b[1])
            if one == two:
                assert settings.audience_for(ENDPOINT) == elsewhere
            else:
                with pytest.raises(ConfigError, match="another server"):
                    settings.audience_for(ENDPOINT)
                tried += 1
    assert tried == 6


def test_an_endpoint_from_elsewhere_does_not_get_the_audience_of_a_preset(written):
    settings = load(written("[profiles.a]\npreset = 'wipo-das'\n") | {"token_endpoint": ENDPOINT})
    with pytest.raises(ConfigError, match="preset"):
        settings.audience_for(ENDPOINT)


def test_audience_is_the_endpoint_as_it_stands_unless_set():
    endpoint = "https://login.example:443/token"
    assert load({"token_endpoint": endpoint}).audience_for(endpoint) == endpoint


def test_an_audience_on_the_endpoints_origin_or_without_one_is_taken(written):
    profile = written(f"[profiles.a]\ntoken-endpoint = '{ENDPOINT}'\n")
    assert (
        load(profile | {"audience": "https://login.example:443/"}).audience_for(ENDPOINT)
        == "https://login.example:443/"
    )
    assert load(profile | {"audience": "das"}).audience_for(ENDPOINT) == "das"


def test_fapi2_takes_the_issuer_for_the_audience(written):
    profile = f"[profiles.a]\npreset = 'fapi2'\ntoken-endpoint = '{ENDPOINT}'\n"
    with pytest.raises(ConfigError, match="no issuer"):
        load(written(profile)).audience_for(ENDPOINT)
    settings = load(written(f"{profile}issuer = 'https://login.example'\n"))
    assert (settings.audience_for(ENDPOINT), settings.claims) == ("https://login.example", "oidc")


def test_proxy_comes_from_the_environment_but_never_for_loopback():
    environ = {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "inside.example"}
    settings = load({})
    assert config.proxy_for(settings, ENDPOINT, environ) == "http://proxy.example:3128"
    assert config.proxy_for(settings, "https://a.inside.example/t", environ) is None
    assert config.proxy_for(settings, "http://127.0.0.1:8080/t", environ) is None
    chosen = load({"proxy": "http://mine.example:1"})
    assert config.proxy_for(chosen, "https://a.inside.example/t", environ) == "http://mine.example:1"
    assert config.proxy_for(chosen, "https://[::1]/t", environ) is None


def test_a_module_that_others_can_write_is_refused(tmp_path):
    module = tmp_path / "module.so"
    module.touch(mode=0o600)
    assert config.prepared_module(load({"module": str(module)})) == str(module)
    module.chmod(0o666)
    with pytest.raises(ConfigError, match=r"module\.so"):
        config.prepared_module(load({"module": str(module)}))
    with pytest.raises(ModuleError, match="No such file"):
        config.prepared_module(load({"module": str(tmp_path / "none.so")}))


def test_a_missing_setting_says_how_to_give_it():
    with pytest.raises(ConfigError, match="no client-id given") as caught:
        load({}).require("client_id")
    assert "HSM_TOKEN_CLIENT_ID" in str(caught.value.hint)


def test_a_configuration_may_be_reached_through_a_link(written, tmp_path):
    written("[profiles.a]\nscope = 'x'\n")
    link = tmp_path / "link.toml"
    link.symlink_to(tmp_path / "config.toml")
    assert load({"config": str(link)}).scope == "x"
    assert Path(link).is_symlink()


def test_of_several_profiles_one_is_to_be_chosen(written):
    settings = load(written('[profiles.das-test]\nkey = "a"\n[profiles.das]\nkey = "b"\n'))
    with pytest.raises(ConfigError, match="no client-id given") as failed:
        settings.require("client_id")
    assert failed.value.hint == "choose a profile with --profile: das-test, das"


def test_where_no_file_is_the_places_that_were_looked_at_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="no profile 'das', since there is no configuration file") as failed:
        load({"profile": "das"})
    assert f"{tmp_path}/hsm-token/config.toml and /etc/hsm-token/config.toml" in str(failed.value.hint)


def test_a_place_that_cannot_be_looked_at_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ("x" * 300)))
    with pytest.raises(ConfigError, match=r"cannot read .*config\.toml: File name too long"):
        load({})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("HSM_TOKEN_AUDINCE", ["HSM_TOKEN_AUDINCE is not read: did you mean HSM_TOKEN_AUDIENCE?"]),
        ("HSM_TOKEN_QQQQQQQQQQQQQQQQQQQQQQQ", ["HSM_TOKEN_QQQQQQQQQQQQQQQQQQQQQQQ is not read"]),
        ("HSM_TOKEN_OFFICE", []),
        ("HSM_TOKEN_PIN", []),
        ("HSM_TOKEN_PROFILE", []),
    ],
)
def test_a_variable_that_nobody_reads_is_told_and_its_value_is_not(caplog, written, name, told):
    options = written('[profiles.canary]\npin-source = "env:HSM_TOKEN_OFFICE"\n')
    load(options, {name: "canary"})
    assert [record.getMessage() for record in caplog.records] == told
