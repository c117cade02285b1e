/* An NVTX tool that writes down what a program emits: one tab-separated line per domain, category and range.
 *
 * NVTX loads the library that NVTX_INJECTION64_PATH names and calls InitializeInjectionNvtx2, which puts our functions
 * into NVTX's table for domains (module CORE2). The numbers below are fixed by NVTX version 3's binary interface. A
 * domain's or a string's handle is for the tool to choose: here it is a copy of the name. */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXPORT_TABLE_CALLBACKS = 1, MODULE_CORE2 = 5 };
enum { PUSH = 4, POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, DOMAIN_CREATE = 12, CORE2_SIZE = 16 };
enum { PAYLOAD_INT64 = 2, MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3 };

struct attributes {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    int64_t payload;
    int32_t message_type;
    const char *message;
};
struct callbacks {
    size_t size;
    int (*module_table)(int module, void (****table)(void), unsigned *size);
};

static FILE *out;

static void *create(const char *name) {
    fprintf(out, "domain\t%s\n", name);
    return strdup(name);
}
static void *register_string(void *domain, const char *text) {
    (void)domain;
    return strdup(text);
}
static void name_category(void *domain, uint32_t id, const char *name) {
    fprintf(out, "category\t%s\t%u\t%s\n", (char *)domain, id, name);
}
static int push(void *domain, const struct attributes *a) {
    int readable = a->message_type == MESSAGE_ASCII || a->message_type == MESSAGE_REGISTERED;
    fprintf(out, "push\t%s\t%u\t%s\t", (char *)domain, a->category, readable ? a->message : "?");
    if (a->payload_type == PAYLOAD_INT64) fprintf(out, "%" PRId64, a->payload);
    fputc('\n', out);
    return 0;
}
static int pop(void *domain) {
    fprintf(out, "pop\t%s\n", (char *)domain);
    return 0;
}

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    const struct callbacks *callbacks = export_table(EXPORT_TABLE_CALLBACKS);
    const char *path = getenv("NVTX_LOG");
    void (***table)(void) = NULL;
    unsigned size = 0;
    if (!path || !(out = fopen(path, "w"))) return 0;
    setvbuf(out, NULL, _IOLBF, 0);
    if (!callbacks->module_table(MODULE_CORE2, &table, &size) || size < CORE2_SIZE) return 0;
    *table[PUSH] = (void (*)(void))push;
    *table[POP] = (void (*)(void))pop;
    *table[NAME_CATEGORY] = (void (*)(void))name_category;
    *table[REGISTER_STRING] = (void (*)(void))register_string;
    *table[DOMAIN_CREATE] = (void (*)(void))create;
    return 1;
}
