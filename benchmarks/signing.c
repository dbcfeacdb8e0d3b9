/* How fast a token signs when nothing but C stands before it: MODULE TOKEN KEY SECONDS sign|verify, PIN in $PIN.
 *
 * sign:   C_SignInit and C_Sign of 32 bytes, as often as they can
 * verify: and OpenSSL verifies each signature with the key's public half
 *
 * Prints how many per second.
 */
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <openssl/core_names.h>
#include <openssl/ecdsa.h>
#include <openssl/evp.h>
#include <openssl/param_build.h>
#include <p11-kit/pkcs11.h>

#define HALF 32 /* bytes of r, s and a coordinate of P-256 */

static CK_FUNCTION_LIST *p11;

static void must(bool held, const char *what)
{
    if (!held) {
        fprintf(stderr, "signing: %s failed\n", what);
        exit(1);
    }
}
#define OK(call) must((call) == CKR_OK, #call)

static CK_SLOT_ID find_slot(const char *label)
{
    CK_SLOT_ID slots[64];
    CK_ULONG count = 64;
    OK(p11->C_GetSlotList(CK_TRUE, slots, &count));
    for (CK_ULONG i = 0; i < count; i++) {
        CK_TOKEN_INFO info;
        if (p11->C_GetTokenInfo(slots[i], &info) == CKR_OK && !memcmp(info.label, label, strlen(label)))
            return slots[i];
    }
    must(false, "finding the token");
    return 0;
}

static CK_OBJECT_HANDLE find_key(CK_SESSION_HANDLE session, CK_OBJECT_CLASS class, char *label)
{
    CK_KEY_TYPE type = CKK_EC;
    CK_ATTRIBUTE template[] = {
        {CKA_CLASS, &class, sizeof class}, {CKA_KEY_TYPE, &type, sizeof type}, {CKA_LABEL, label, strlen(label)}};
    CK_OBJECT_HANDLE found[2];
    CK_ULONG count;
    OK(p11->C_FindObjectsInit(session, template, 3));
    OK(p11->C_FindObjects(session, found, 2, &count));
    OK(p11->C_FindObjectsFinal(session));
    must(count == 1, "finding one key");
    return found[0];
}

static EVP_PKEY_CTX *verifier(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE public_key)
{
    CK_BYTE wrapped[2 + 1 + 2 * HALF]; /* an OCTET STRING around the uncompressed point */
    CK_ATTRIBUTE point = {CKA_EC_POINT, wrapped, sizeof wrapped};
    OK(p11->C_GetAttributeValue(session, public_key, &point, 1));
    OSSL_PARAM_BLD *build = OSSL_PARAM_BLD_new();
    OSSL_PARAM_BLD_push_utf8_string(build, OSSL_PKEY_PARAM_GROUP_NAME, "prime256v1", 0);
    OSSL_PARAM_BLD_push_octet_string(build, OSSL_PKEY_PARAM_PUB_KEY, wrapped + 2, sizeof wrapped - 2);
    OSSL_PARAM *parameters = OSSL_PARAM_BLD_to_param(build);
    EVP_PKEY *key = NULL;
    EVP_PKEY_CTX *context = EVP_PKEY_CTX_new_from_name(NULL, "EC", NULL);
    must(EVP_PKEY_fromdata_init(context) == 1, "OpenSSL");
    must(EVP_PKEY_fromdata(context, &key, EVP_PKEY_PUBLIC_KEY, parameters) == 1, "reading the public key");
    EVP_PKEY_CTX *verification = EVP_PKEY_CTX_new(key, NULL);
    must(EVP_PKEY_verify_init(verification) == 1, "OpenSSL");
    return verification;
}

static void verify(EVP_PKEY_CTX *context, const CK_BYTE *signature, const CK_BYTE *digest)
{
    unsigned char der[80], *end = der;
    ECDSA_SIG *pair = ECDSA_SIG_new();
    ECDSA_SIG_set0(pair, BN_bin2bn(signature, HALF, NULL), BN_bin2bn(signature + HALF, HALF, NULL));
    int length = i2d_ECDSA_SIG(pair, &end);
    ECDSA_SIG_free(pair);
    must(EVP_PKEY_verify(context, der, (size_t)length, digest, HALF) == 1, "a verification");
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

int main(int count, char **arguments)
{
    must(count == 6 && getenv("PIN"), "reading the arguments");
    void *module = dlopen(arguments[1], RTLD_NOW);
    must(module != NULL, "loading the module");
    CK_RV (*get_function_list)(CK_FUNCTION_LIST **);
    *(void **)&get_function_list = dlsym(module, "C_GetFunctionList");
    OK(get_function_list(&p11));
    OK(p11->C_Initialize(NULL));
    CK_SESSION_HANDLE session;
    OK(p11->C_OpenSession(find_slot(arguments[2]), CKF_SERIAL_SESSION, NULL, NULL, &session));
    OK(p11->C_Login(session, CKU_USER, (CK_UTF8CHAR *)getenv("PIN"), strlen(getenv("PIN"))));
    CK_OBJECT_HANDLE key = find_key(session, CKO_PRIVATE_KEY, arguments[3]);
    EVP_PKEY_CTX *verification = NULL;
    if (!strcmp(arguments[5], "verify"))
        verification = verifier(session, find_key(session, CKO_PUBLIC_KEY, arguments[3]));

    CK_MECHANISM mechanism = {CKM_ECDSA, NULL, 0};
    CK_BYTE digest[HALF] = "thirty-two bytes to be signed...", signature[2 * HALF];
    double begin = now(), end = begin + atof(arguments[4]);
    long done = 0;
    for (; now() < end; done++) {
        CK_ULONG length = sizeof signature;
        OK(p11->C_SignInit(session, &mechanism, key));
        OK(p11->C_Sign(session, digest, sizeof digest, signature, &length));
        if (verification)
            verify(verification, signature, digest);
    }
    printf("%f\n", (double)done / (now() - begin));
    OK(p11->C_Finalize(NULL));
    return 0;
}
