/* A PKCS#11 module that forwards to a real one and misbehaves as told.
 *
 * Every call passes three layers: the front writes it down, waits and fails by rule; `behind` bends what some
 * functions take and give; `real` is the module that is forwarded to.
 *
 * Beside this file's shared object X lie X.control, rules read anew whenever the file is replaced, and X.log,
 * where each call appends two lines:  PID C_Name  before and  PID C_Name = 0xRV sessions=N  after.
 *
 *   module PATH              the real module, read once
 *   pin TEXT                 what the person types on the PIN pad
 *   fail C_Name NTH RV       the NTH call from now on returns RV and does nothing; NTH 0: every call
 *   delay C_Name MS          each call takes so long; hang C_Name: until the rule is gone
 *   signature HOW            der, short, long, empty or wrong (a bit of s is flipped)
 *   point HOW                CKA_EC_POINT without its DER wrapping: raw (65 bytes) or bare (64)
 *   only-hashing             CKM_ECDSA_SHA256 instead of CKM_ECDSA
 *   cant-lock                CKF_OS_LOCKING_OK is refused
 *   token-flags MASK         shown in CK_TOKEN_INFO besides the real ones; LOCKED makes C_Login fail as well
 *   pin-pad                  CKF_PROTECTED_AUTHENTICATION_PATH: C_Login takes no PIN but asks the person
 *   max-sessions N           the next one is refused
 *   only-read-write          sessions that are read-only are refused
 *   removed                  the token is pulled out; its sessions are gone for good
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <p11-kit/pkcs11.h>

#define MAX_RULES 64
#define MAX_SESSIONS 4096
#define CKR_NOT_FAILED ((CK_RV)-1)
#define HALF 32 /* bytes of r, s and a coordinate of P-256 */

struct rule {
    char name[32];     /* fail, delay, signature … */
    char subject[256]; /* C_Name, der, a path … */
    unsigned long number, result;
    unsigned long calls; /* of subject since the rule was read */
};

static struct rule rules[MAX_RULES];
static size_t rule_count;
static struct timespec rules_time;
static ino_t rules_inode;

static struct { CK_SESSION_HANDLE handle; CK_SLOT_ID slot; } sessions[MAX_SESSIONS];
static size_t session_count;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* around all of the above */
static char control_path[4096], log_path[4096], real_path[4096];
static CK_FUNCTION_LIST *real, behind;

/* ---- rules ---- */

static void read_rules(void)
{
    struct stat now;
    if (stat(control_path, &now) != 0)
        return;
    if (now.st_ino == rules_inode && now.st_mtim.tv_sec == rules_time.tv_sec
        && now.st_mtim.tv_nsec == rules_time.tv_nsec)
        return;
    FILE *file = fopen(control_path, "r");
    if (!file)
        return;
    rules_inode = now.st_ino;
    rules_time = now.st_mtim;
    rule_count = 0;
    char line[512];
    while (rule_count < MAX_RULES && fgets(line, sizeof line, file)) {
        struct rule *rule = &rules[rule_count];
        char number[32] = "", result[32] = "";
        *rule = (struct rule){0};
        if (sscanf(line, "%31s %255s %31s %31s", rule->name, rule->subject, number, result) < 1)
            continue;
        rule->number = strtoul(number, NULL, 0);
        rule->result = strtoul(result, NULL, 0);
        rule_count++;
    }
    fclose(file);
}

/* Copy the rule of this name, and of this subject where one is asked for. */
static bool find_rule(const char *name, const char *subject, struct rule *found)
{
    bool is_there = false;
    pthread_mutex_lock(&lock);
    read_rules();
    for (size_t i = 0; i < rule_count && !is_there; i++) {
        is_there = !strcmp(rules[i].name, name) && (!subject || !strcmp(rules[i].subject, subject));
        if (is_there && found)
            *found = rules[i];
    }
    pthread_mutex_unlock(&lock);
    return is_there;
}

static bool told(const char *name, const char *subject)
{
    return find_rule(name, subject, NULL);
}

/* The result that a rule wants this call to have; counts the call. */
static CK_RV planned_failure(const char *function)
{
    CK_RV rv = CKR_NOT_FAILED;
    pthread_mutex_lock(&lock);
    read_rules();
    for (size_t i = 0; i < rule_count; i++) {
        struct rule *rule = &rules[i];
        if (strcmp(rule->name, "fail") || strcmp(rule->subject, function))
            continue;
        rule->calls++;
        if (rule->number == 0 || rule->calls == rule->number)
            rv = rule->result;
    }
    pthread_mutex_unlock(&lock);
    return rv;
}

static void sleep_ms(unsigned long ms)
{
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    while (nanosleep(&left, &left) != 0)
        ; /* a signal does not wake a device */
}

/* ---- sessions ---- */

static void remember_session(CK_SESSION_HANDLE handle, CK_SLOT_ID slot)
{
    pthread_mutex_lock(&lock);
    if (session_count < MAX_SESSIONS) {
        sessions[session_count].handle = handle;
        sessions[session_count++].slot = slot;
    }
    pthread_mutex_unlock(&lock);
}

static void forget_session(CK_SESSION_HANDLE handle)
{
    pthread_mutex_lock(&lock);
    for (size_t i = session_count; i-- > 0;)
        if (sessions[i].handle == handle)
            sessions[i] = sessions[--session_count];
    pthread_mutex_unlock(&lock);
}

static void forget_sessions_of(const CK_SLOT_ID *slot)
{
    pthread_mutex_lock(&lock);
    for (size_t i = session_count; i-- > 0;)
        if (!slot || sessions[i].slot == *slot)
            sessions[i] = sessions[--session_count];
    pthread_mutex_unlock(&lock);
}

/* A token that is pulled out takes its sessions and its login with it. */
static void pull_out(void)
{
    CK_SLOT_ID slots[64];
    CK_ULONG count = 64;
    pthread_mutex_lock(&lock);
    bool idle = session_count == 0;
    pthread_mutex_unlock(&lock);
    if (idle || real->C_GetSlotList(CK_TRUE, slots, &count) != CKR_OK)
        return;
    for (CK_ULONG i = 0; i < count; i++)
        real->C_CloseAllSessions(slots[i]);
    forget_sessions_of(NULL);
}

/* ---- the front: every function is written down, delayed and failed here ---- */

static void write_down(const char *text, int length)
{
    /* O_APPEND keeps the lines of many processes apart; opened anew so that a fork shares no offset */
    int file = open(log_path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || write(file, text, (size_t)length) != length)
        abort(); /* a test that counts must not count too few */
    close(file);
}

/* What a call answers while the token is pulled out. */
static CK_RV without_token(const char *function)
{
    static const char *const unharmed = "C_Initialize C_Finalize C_GetInfo C_GetSlotList C_GetSlotInfo ";
    static const char *const of_a_slot = "C_OpenSession C_GetTokenInfo C_GetMechanismList C_GetMechanismInfo ";
    char word[64];
    snprintf(word, sizeof word, "%s ", function);
    if (strstr(unharmed, word))
        return CKR_NOT_FAILED;
    pull_out();
    return strstr(of_a_slot, word) ? CKR_TOKEN_NOT_PRESENT : CKR_DEVICE_REMOVED;
}

static CK_RV enter(const char *function)
{
    char text[64];
    struct rule delay;
    write_down(text, snprintf(text, sizeof text, "%d %s\n", getpid(), function));
    if (find_rule("delay", function, &delay))
        sleep_ms(delay.number);
    while (told("hang", function))
        sleep_ms(10);
    CK_RV rv = planned_failure(function);
    return rv == CKR_NOT_FAILED && told("removed", NULL) ? without_token(function) : rv;
}

static CK_RV leave(const char *function, CK_RV rv)
{
    char text[96];
    pthread_mutex_lock(&lock);
    size_t count = session_count;
    pthread_mutex_unlock(&lock);
    write_down(text, snprintf(text, sizeof text, "%d %s = 0x%lx sessions=%zu\n", getpid(), function, rv, count));
    return rv;
}

#define FRONT(name, parameters, arguments)                                                                   \
    CK_RV name parameters                                                                                    \
    {                                                                                                        \
        CK_RV rv = enter(#name);                                                                             \
        return leave(#name, rv == CKR_NOT_FAILED ? behind.name arguments : rv);                              \
    }

/* The shapes that most functions share: a session, and bytes that go in and come out. */
#define S CK_SESSION_HANDLE s
#define IN CK_BYTE *in, CK_ULONG in_length
#define OUT CK_BYTE *out, CK_ULONG *out_length
#define TEMPLATE CK_ATTRIBUTE *template, CK_ULONG count
#define MECHANISM CK_MECHANISM *mechanism
#define FRONT_S(name) FRONT(name, (S), (s))
#define FRONT_IN(name) FRONT(name, (S, IN), (s, in, in_length))
#define FRONT_OUT(name) FRONT(name, (S, OUT), (s, out, out_length))
#define FRONT_IN_OUT(name) FRONT(name, (S, IN, OUT), (s, in, in_length, out, out_length))
#define FRONT_KEY(name) FRONT(name, (S, MECHANISM, CK_OBJECT_HANDLE key), (s, mechanism, key))

FRONT(C_Initialize, (void *a), (a))
FRONT(C_Finalize, (void *a), (a))
FRONT(C_GetInfo, (CK_INFO *a), (a))
FRONT(C_GetSlotList, (CK_BBOOL a, CK_SLOT_ID *b, CK_ULONG *c), (a, b, c))
FRONT(C_GetSlotInfo, (CK_SLOT_ID a, CK_SLOT_INFO *b), (a, b))
FRONT(C_GetTokenInfo, (CK_SLOT_ID a, CK_TOKEN_INFO *b), (a, b))
FRONT(C_GetMechanismList, (CK_SLOT_ID a, CK_MECHANISM_TYPE *b, CK_ULONG *c), (a, b, c))
FRONT(C_GetMechanismInfo, (CK_SLOT_ID a, CK_MECHANISM_TYPE b, CK_MECHANISM_INFO *c), (a, b, c))
FRONT(C_WaitForSlotEvent, (CK_FLAGS a, CK_SLOT_ID *b, void *c), (a, b, c))
FRONT(C_InitToken, (CK_SLOT_ID a, IN, CK_BYTE *b), (a, in, in_length, b))
FRONT_IN(C_InitPIN)
FRONT(C_SetPIN, (S, IN, CK_BYTE *b, CK_ULONG c), (s, in, in_length, b, c))
FRONT(C_OpenSession, (CK_SLOT_ID a, CK_FLAGS b, void *c, CK_NOTIFY d, CK_SESSION_HANDLE *e), (a, b, c, d, e))
FRONT_S(C_CloseSession)
FRONT(C_CloseAllSessions, (CK_SLOT_ID a), (a))
FRONT(C_GetSessionInfo, (S, CK_SESSION_INFO *a), (s, a))
FRONT_OUT(C_GetOperationState)
FRONT(C_SetOperationState, (S, IN, CK_OBJECT_HANDLE a, CK_OBJECT_HANDLE b), (s, in, in_length, a, b))
FRONT(C_Login, (S, CK_USER_TYPE a, IN), (s, a, in, in_length))
FRONT_S(C_Logout)
FRONT(C_CreateObject, (S, TEMPLATE, CK_OBJECT_HANDLE *a), (s, template, count, a))
FRONT(C_CopyObject, (S, CK_OBJECT_HANDLE a, TEMPLATE, CK_OBJECT_HANDLE *b), (s, a, template, count, b))
FRONT(C_DestroyObject, (S, CK_OBJECT_HANDLE a), (s, a))
FRONT(C_GetObjectSize, (S, CK_OBJECT_HANDLE a, CK_ULONG *b), (s, a, b))
FRONT(C_GetAttributeValue, (S, CK_OBJECT_HANDLE a, TEMPLATE), (s, a, template, count))
FRONT(C_SetAttributeValue, (S, CK_OBJECT_HANDLE a, TEMPLATE), (s, a, template, count))
FRONT(C_FindObjectsInit, (S, TEMPLATE), (s, template, count))
FRONT(C_FindObjects, (S, CK_OBJECT_HANDLE *a, CK_ULONG b, CK_ULONG *c), (s, a, b, c))
FRONT_S(C_FindObjectsFinal)
FRONT_KEY(C_EncryptInit)
FRONT_IN_OUT(C_Encrypt)
FRONT_IN_OUT(C_EncryptUpdate)
FRONT_OUT(C_EncryptFinal)
FRONT_KEY(C_DecryptInit)
FRONT_IN_OUT(C_Decrypt)
FRONT_IN_OUT(C_DecryptUpdate)
FRONT_OUT(C_DecryptFinal)
FRONT(C_DigestInit, (S, MECHANISM), (s, mechanism))
FRONT_IN_OUT(C_Digest)
FRONT_IN(C_DigestUpdate)
FRONT(C_DigestKey, (S, CK_OBJECT_HANDLE a), (s, a))
FRONT_OUT(C_DigestFinal)
FRONT_KEY(C_SignInit)
FRONT_IN_OUT(C_Sign)
FRONT_IN(C_SignUpdate)
FRONT_OUT(C_SignFinal)
FRONT_KEY(C_SignRecoverInit)
FRONT_IN_OUT(C_SignRecover)
FRONT_KEY(C_VerifyInit)
FRONT(C_Verify, (S, IN, CK_BYTE *a, CK_ULONG b), (s, in, in_length, a, b))
FRONT_IN(C_VerifyUpdate)
FRONT_IN(C_VerifyFinal)
FRONT_KEY(C_VerifyRecoverInit)
FRONT_IN_OUT(C_VerifyRecover)
FRONT_IN_OUT(C_DigestEncryptUpdate)
FRONT_IN_OUT(C_DecryptDigestUpdate)
FRONT_IN_OUT(C_SignEncryptUpdate)
FRONT_IN_OUT(C_DecryptVerifyUpdate)
FRONT(C_GenerateKey, (S, MECHANISM, TEMPLATE, CK_OBJECT_HANDLE *a), (s, mechanism, template, count, a))
FRONT(C_GenerateKeyPair,
      (S, MECHANISM, TEMPLATE, CK_ATTRIBUTE *a, CK_ULONG b, CK_OBJECT_HANDLE *c, CK_OBJECT_HANDLE *d),
      (s, mechanism, template, count, a, b, c, d))
FRONT(C_WrapKey, (S, MECHANISM, CK_OBJECT_HANDLE a, CK_OBJECT_HANDLE b, OUT),
      (s, mechanism, a, b, out, out_length))
FRONT(C_UnwrapKey, (S, MECHANISM, CK_OBJECT_HANDLE a, IN, TEMPLATE, CK_OBJECT_HANDLE *b),
      (s, mechanism, a, in, in_length, template, count, b))
FRONT(C_DeriveKey, (S, MECHANISM, CK_OBJECT_HANDLE a, TEMPLATE, CK_OBJECT_HANDLE *b),
      (s, mechanism, a, template, count, b))
FRONT_IN(C_SeedRandom)
FRONT_IN(C_GenerateRandom)
FRONT_S(C_GetFunctionStatus)
FRONT_S(C_CancelFunction)

/* ---- behind: what is bent on its way to the real module and back ---- */

static CK_RV initialize(void *arguments)
{
    CK_C_INITIALIZE_ARGS *given = arguments;
    if (told("cant-lock", NULL) && given && given->flags & CKF_OS_LOCKING_OK)
        return CKR_CANT_LOCK;
    return real->C_Initialize(arguments);
}

static CK_RV finalize(void *reserved)
{
    CK_RV rv = real->C_Finalize(reserved);
    if (rv == CKR_OK)
        forget_sessions_of(NULL);
    return rv;
}

static CK_RV get_slot_list(CK_BBOOL with_token, CK_SLOT_ID *slots, CK_ULONG *count)
{
    if (!with_token || !told("removed", NULL))
        return real->C_GetSlotList(with_token, slots, count);
    *count = 0;
    return CKR_OK;
}

static CK_RV get_slot_info(CK_SLOT_ID slot, CK_SLOT_INFO *info)
{
    CK_RV rv = real->C_GetSlotInfo(slot, info);
    if (rv == CKR_OK && told("removed", NULL))
        info->flags &= ~CKF_TOKEN_PRESENT;
    return rv;
}

static CK_RV get_token_info(CK_SLOT_ID slot, CK_TOKEN_INFO *info)
{
    struct rule rule;
    CK_RV rv = real->C_GetTokenInfo(slot, info);
    if (rv == CKR_OK && find_rule("token-flags", NULL, &rule))
        info->flags |= strtoul(rule.subject, NULL, 0);
    if (rv == CKR_OK && told("pin-pad", NULL))
        info->flags |= CKF_PROTECTED_AUTHENTICATION_PATH;
    return rv;
}

static CK_RV open_session(CK_SLOT_ID slot, CK_FLAGS flags, void *application, CK_NOTIFY notify,
                          CK_SESSION_HANDLE *session)
{
    struct rule rule;
    pthread_mutex_lock(&lock);
    size_t count = session_count;
    pthread_mutex_unlock(&lock);
    if (find_rule("max-sessions", NULL, &rule) && count >= strtoul(rule.subject, NULL, 0))
        return CKR_SESSION_COUNT;
    if (told("only-read-write", NULL) && !(flags & CKF_RW_SESSION))
        return CKR_FUNCTION_FAILED;
    CK_RV rv = real->C_OpenSession(slot, flags, application, notify, session);
    if (rv == CKR_OK)
        remember_session(*session, slot);
    return rv;
}

static CK_RV close_session(CK_SESSION_HANDLE session)
{
    CK_RV rv = real->C_CloseSession(session);
    if (rv == CKR_OK)
        forget_session(session);
    return rv;
}

static CK_RV close_all_sessions(CK_SLOT_ID slot)
{
    CK_RV rv = real->C_CloseAllSessions(slot);
    if (rv == CKR_OK)
        forget_sessions_of(&slot);
    return rv;
}

static CK_RV login(CK_SESSION_HANDLE session, CK_USER_TYPE user, CK_BYTE *pin, CK_ULONG length)
{
    struct rule rule;
    if (find_rule("token-flags", NULL, &rule) && strtoul(rule.subject, NULL, 0) & CKF_USER_PIN_LOCKED)
        return CKR_PIN_LOCKED;
    if (!told("pin-pad", NULL))
        return real->C_Login(session, user, pin, length);
    if (pin)
        return CKR_ARGUMENTS_BAD;
    if (!find_rule("pin", NULL, &rule))
        return CKR_FUNCTION_CANCELED;
    return real->C_Login(session, user, (CK_BYTE *)rule.subject, strlen(rule.subject));
}

static CK_RV get_mechanism_list(CK_SLOT_ID slot, CK_MECHANISM_TYPE *list, CK_ULONG *count)
{
    CK_RV rv = real->C_GetMechanismList(slot, list, count);
    if (rv == CKR_OK && list && told("only-hashing", NULL))
        for (CK_ULONG i = 0; i < *count; i++)
            if (list[i] == CKM_ECDSA)
                list[i] = CKM_ECDSA_SHA256;
    return rv;
}

static CK_RV get_mechanism_info(CK_SLOT_ID slot, CK_MECHANISM_TYPE type, CK_MECHANISM_INFO *info)
{
    if (told("only-hashing", NULL) && type == CKM_ECDSA)
        return CKR_MECHANISM_INVALID;
    if (told("only-hashing", NULL) && type == CKM_ECDSA_SHA256)
        type = CKM_ECDSA;
    return real->C_GetMechanismInfo(slot, type, info);
}

static CK_RV sign_init(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    CK_MECHANISM ecdsa = {.mechanism = CKM_ECDSA};
    if (!told("only-hashing", NULL))
        return real->C_SignInit(session, mechanism, key);
    if (mechanism->mechanism != CKM_ECDSA_SHA256)
        return CKR_MECHANISM_INVALID;
    return real->C_SignInit(session, &ecdsa, key);
}

/* SHA-256 by the real module, in a session of its own: the caller's is busy signing. */
static CK_RV sha256(CK_SESSION_HANDLE session, CK_BYTE *data, CK_ULONG length, CK_BYTE digest[32])
{
    CK_MECHANISM mechanism = {.mechanism = CKM_SHA256};
    CK_SESSION_INFO info;
    CK_SESSION_HANDLE own;
    CK_ULONG size = 32;
    CK_RV rv = real->C_GetSessionInfo(session, &info);
    if (rv == CKR_OK)
        rv = real->C_OpenSession(info.slotID, CKF_SERIAL_SESSION, NULL, NULL, &own);
    if (rv != CKR_OK)
        return rv;
    rv = real->C_DigestInit(own, &mechanism);
    if (rv == CKR_OK)
        rv = real->C_Digest(own, data, length, digest, &size);
    real->C_CloseSession(own);
    return rv;
}

/* An INTEGER of DER (X.690 §8.3) from an unsigned number of 32 bytes; returns its length. */
static size_t der_integer(CK_BYTE *out, const CK_BYTE *number)
{
    size_t skip = 0;
    while (skip < HALF - 1 && number[skip] == 0)
        skip++;
    size_t pad = number[skip] >> 7, length = HALF - skip + pad;
    out[0] = 0x02;
    out[1] = (CK_BYTE)length;
    out[2] = 0;
    memcpy(out + 2 + pad, number + skip, HALF - skip);
    return 2 + length;
}

static size_t bend_signature(const char *how, CK_BYTE *signature)
{
    CK_BYTE raw[2 * HALF];
    memcpy(raw, signature, sizeof raw);
    if (!strcmp(how, "short"))
        return sizeof raw - 1;
    if (!strcmp(how, "empty"))
        return 0;
    if (!strcmp(how, "long"))
        return signature[sizeof raw] = 0, sizeof raw + 1;
    if (!strcmp(how, "wrong"))
        return signature[sizeof raw - 1] ^= 1, sizeof raw;
    size_t length = 2;
    length += der_integer(signature + length, raw);
    length += der_integer(signature + length, raw + HALF);
    signature[0] = 0x30;
    signature[1] = (CK_BYTE)(length - 2);
    return length;
}

static CK_RV sign(CK_SESSION_HANDLE session, CK_BYTE *data, CK_ULONG length, CK_BYTE *signature, CK_ULONG *size)
{
    struct rule rule;
    CK_BYTE digest[32], bent[72];
    CK_ULONG bent_size = 2 * HALF;
    bool bends = find_rule("signature", NULL, &rule);
    if (signature && told("only-hashing", NULL)) {
        CK_RV rv = sha256(session, data, length, digest);
        if (rv != CKR_OK)
            return rv;
        data = digest;
        length = sizeof digest;
    }
    if (!bends)
        return real->C_Sign(session, data, length, signature, size);
    if (!signature || *size < sizeof bent) {
        *size = sizeof bent;
        return signature ? CKR_BUFFER_TOO_SMALL : CKR_OK;
    }
    CK_RV rv = real->C_Sign(session, data, length, bent, &bent_size);
    if (rv != CKR_OK)
        return rv;
    *size = bend_signature(rule.subject, bent);
    memcpy(signature, bent, *size);
    return CKR_OK;
}

/* CKA_EC_POINT from the real module without the first `skip` bytes: the DER wrapping, and the 04 where bare. */
static CK_RV get_bent_point(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, size_t skip, CK_ATTRIBUTE *wanted)
{
    CK_BYTE point[256];
    CK_ATTRIBUTE whole = {CKA_EC_POINT, point, sizeof point};
    CK_RV rv = real->C_GetAttributeValue(session, object, &whole, 1);
    if (rv != CKR_OK || whole.ulValueLen < skip) {
        wanted->ulValueLen = CK_UNAVAILABLE_INFORMATION;
        return rv;
    }
    CK_ULONG size = whole.ulValueLen - skip, room = wanted->ulValueLen;
    wanted->ulValueLen = wanted->pValue && room < size ? CK_UNAVAILABLE_INFORMATION : size;
    if (wanted->pValue && room < size)
        return CKR_BUFFER_TOO_SMALL;
    if (wanted->pValue)
        memcpy(wanted->pValue, point + skip, size);
    return CKR_OK;
}

static CK_RV get_attribute_value(CK_SESSION_HANDLE session, CK_OBJECT_HANDLE object, CK_ATTRIBUTE *template,
                                 CK_ULONG count)
{
    struct rule rule;
    if (!find_rule("point", NULL, &rule))
        return real->C_GetAttributeValue(session, object, template, count);
    CK_RV rv = CKR_OK;
    for (CK_ULONG i = 0; i < count; i++) {
        CK_RV one = template[i].type == CKA_EC_POINT
                        ? get_bent_point(session, object, strcmp(rule.subject, "bare") ? 2 : 3, &template[i])
                        : real->C_GetAttributeValue(session, object, &template[i], 1);
        if (one != CKR_OK)
            rv = one;
    }
    return rv;
}

/* ---- loading ---- */

static CK_RV load_real(void)
{
    Dl_info own;
    struct rule rule;
    if (!dladdr((void *)&C_GetFunctionList, &own))
        return CKR_GENERAL_ERROR;
    snprintf(control_path, sizeof control_path, "%s.control", own.dli_fname);
    snprintf(log_path, sizeof log_path, "%s.log", own.dli_fname);
    if (!find_rule("module", NULL, &rule))
        return CKR_GENERAL_ERROR;
    snprintf(real_path, sizeof real_path, "%s", rule.subject);
    void *module = dlopen(real_path, RTLD_NOW | RTLD_LOCAL);
    CK_C_GetFunctionList get = module ? (CK_C_GetFunctionList)dlsym(module, "C_GetFunctionList") : NULL;
    if (!get) {
        fprintf(stderr, "faulty: %s\n", dlerror());
        return CKR_GENERAL_ERROR;
    }
    CK_RV rv = get(&real);
    if (rv != CKR_OK)
        return rv;
    behind = *real;
    behind.C_Initialize = initialize;
    behind.C_Finalize = finalize;
    behind.C_GetSlotList = get_slot_list;
    behind.C_GetSlotInfo = get_slot_info;
    behind.C_GetTokenInfo = get_token_info;
    behind.C_OpenSession = open_session;
    behind.C_CloseSession = close_session;
    behind.C_CloseAllSessions = close_all_sessions;
    behind.C_Login = login;
    behind.C_GetMechanismList = get_mechanism_list;
    behind.C_GetMechanismInfo = get_mechanism_info;
    behind.C_SignInit = sign_init;
    behind.C_Sign = sign;
    behind.C_GetAttributeValue = get_attribute_value;
    return CKR_OK;
}

__attribute__((visibility("default"))) CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list)
{
    static CK_FUNCTION_LIST front = {
        {2, 40}, C_Initialize, C_Finalize, C_GetInfo, C_GetFunctionList, C_GetSlotList, C_GetSlotInfo,
        C_GetTokenInfo, C_GetMechanismList, C_GetMechanismInfo, C_InitToken, C_InitPIN, C_SetPIN, C_OpenSession,
        C_CloseSession, C_CloseAllSessions, C_GetSessionInfo, C_GetOperationState, C_SetOperationState, C_Login,
        C_Logout, C_CreateObject, C_CopyObject, C_DestroyObject, C_GetObjectSize, C_GetAttributeValue,
        C_SetAttributeValue, C_FindObjectsInit, C_FindObjects, C_FindObjectsFinal, C_EncryptInit, C_Encrypt,
        C_EncryptUpdate, C_EncryptFinal, C_DecryptInit, C_Decrypt, C_DecryptUpdate, C_DecryptFinal, C_DigestInit,
        C_Digest, C_DigestUpdate, C_DigestKey, C_DigestFinal, C_SignInit, C_Sign, C_SignUpdate, C_SignFinal,
        C_SignRecoverInit, C_SignRecover, C_VerifyInit, C_Verify, C_VerifyUpdate, C_VerifyFinal,
        C_VerifyRecoverInit, C_VerifyRecover, C_DigestEncryptUpdate, C_DecryptDigestUpdate, C_SignEncryptUpdate,
        C_DecryptVerifyUpdate, C_GenerateKey, C_GenerateKeyPair, C_WrapKey, C_UnwrapKey, C_DeriveKey, C_SeedRandom,
        C_GenerateRandom, C_GetFunctionStatus, C_CancelFunction, C_WaitForSlotEvent,
    };
    CK_RV rv = real ? CKR_OK : load_real();
    *list = &front;
    return rv;
}
