/* test_recipe.c - the grammar of recipes, their canonical text, a file's recipe, and who overrides whom. */
#include <stdlib.h>

#include "check.h"
#include "recipe.h"

enum { N_LAYER = 4 };

/* ---- files made of keys --------------------------------------------------------------------------------------- */

typedef struct {
    uint8_t bytes[4096];
    size_t n;
} image;

static void put(image *file, const void *data, size_t n) {
    memcpy(file->bytes + file->n, data, n);
    file->n += n;
}

static void put_u32(image *file, uint32_t value) { put(file, &value, sizeof value); }
static void put_u64(image *file, uint64_t value) { put(file, &value, sizeof value); }

static void put_string(image *file, const char *text) {
    put_u64(file, strlen(text));
    put(file, text, strlen(text));
}

/* the number of keys is byte 16 */
static void put_key(image *file, const char *key, kvm_gguf_type type) {
    file->bytes[16]++;
    put_string(file, key);
    put_u32(file, (uint32_t)type);
}

static void put_text(image *file, const char *key, const char *text) {
    put_key(file, key, KVM_GGUF_STRING);
    put_string(file, text);
}

static void put_int(image *file, const char *key, int32_t value) {
    put_key(file, key, KVM_GGUF_I32);
    put_u32(file, (uint32_t)value);
}

/* names: separated by single spaces */
static void put_names(image *file, const char *key, const char *names) {
    uint64_t n = 1;
    for (const char *at = names; *at != 0; at++) n += *at == ' ';
    put_key(file, key, KVM_GGUF_ARRAY);
    put_u32(file, KVM_GGUF_STRING);
    put_u64(file, n);
    while (n-- > 0) {
        size_t n_bytes = strcspn(names, " ");
        put_u64(file, n_bytes);
        put(file, names, n_bytes);
        names += n_bytes + 1;
    }
}

static image empty_image(void) {
    image file = {.n = 0};
    put(&file, "GGUF", 4);
    put_u32(&file, 3);
    put_u64(&file, 0);
    put_u64(&file, 0);
    return file;
}

static image recipe_image(int32_t version, const char *k, const char *v) {
    image file = empty_image();
    put_int(&file, "kvmix.version", version);
    if (k != NULL) put_names(&file, "kvmix.k_type", k);
    if (v != NULL) put_names(&file, "kvmix.v_type", v);
    return file;
}

/* ---- resolving ------------------------------------------------------------------------------------------------ */

static kvm_recipe recipe; /* of the last resolve */

static kvmix_session_options no_options(void) {
    kvmix_session_options options;
    kvmix_session_defaults(&options);
    return options;
}

static kvmix_status resolve(const image *file, int32_t n_layer, const kvmix_session_options *options) {
    kvm_gguf *gguf;
    kvmix_status status = kvm_gguf_open_memory(&gguf, file->bytes, file->n, "m.gguf");
    if (!CHECK_STATUS(KVMIX_OK, status)) return status;
    kvm_recipe_keys keys = {.model = gguf};
    status = kvm_recipe_resolve(&recipe, &keys, n_layer, options);
    kvm_gguf_close(gguf);
    return status;
}

static kvmix_status resolve_text(const char *text, int32_t n_layer) {
    image file = empty_image();
    kvmix_session_options options = no_options();
    options.kv = text;
    return resolve(&file, n_layer, &options);
}

/* the recipe's types, layer by layer, are these names */
static bool types_are(const char *k, const char *v) {
    char got_k[256] = "", got_v[256] = "";
    for (int32_t i = 0; i < recipe.n_layer; i++) {
        strcat(strcat(got_k, i ? " " : ""), kvm_kvtypes[recipe.k[i]].name);
        strcat(strcat(got_v, i ? " " : ""), kvm_kvtypes[recipe.v[i]].name);
    }
    bool same = strcmp(got_k, k) == 0 && strcmp(got_v, v) == 0;
    if (!same) fprintf(stderr, "    k: %s, v: %s\n", got_k, got_v);
    return same;
}

/* ---- grammar -------------------------------------------------------------------------------------------------- */

static void test_valid(void) {
    static const struct {
        const char *text, *k, *v, *canonical;
    } cases[] = {
        {"k4v3", "q4 q4 q4 q4", "q3 q3 q3 q3", "k4v3"},
        {"f16", "f16 f16 f16 f16", "f16 f16 f16 f16", "kf16vf16"},
        {"q8", "q8 q8 q8 q8", "q8 q8 q8 q8", "k8v8"},
        {"q4_0", "q4 q4 q4 q4", "q4 q4 q4 q4", "k4v4"},
        {"kf16v2", "f16 f16 f16 f16", "q2 q2 q2 q2", "kf16v2"},
        {"k2vf16,3:f16", "q2 q2 q2 f16", "f16 f16 f16 f16", "k2vf16,3:kf16vf16"},
        {"k4v3,0-1:k8v4", "q8 q8 q4 q4", "q4 q4 q3 q3", "k8v4,2-3:k4v3"}, /* equals: the first layer's pair is common */
        {"k4v3;0:k8v4", "q8 q4 q4 q4", "q4 q3 q3 q3", "k4v3,0:k8v4"},
        {"k4v3,1-2:k8v4,2-3:k2v2", "q4 q8 q2 q2", "q3 q4 q2 q2", "k2v2,0:k4v3,1:k8v4"},
        {"k4v3,0-3:q8", "q8 q8 q8 q8", "q8 q8 q8 q8", "k8v8"},
        {"  k 4 v 3 , 0 - 1 : k8 v4 ; 3 : k2v2 ", "q8 q8 q4 q2", "q4 q4 q3 q2", "k8v4,2:k4v3,3:k2v2"},
        {"k4v3,00:k8v8", "q8 q4 q4 q4", "q8 q3 q3 q3", "k4v3,0:k8v8"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (!CHECK_STATUS(KVMIX_OK, resolve_text(cases[i].text, N_LAYER))) continue;
        CHECK(types_are(cases[i].k, cases[i].v));
        if (!CHECK(strcmp(recipe.text, cases[i].canonical) == 0)) fprintf(stderr, "    %s\n", recipe.text);
        CHECK(strcmp(recipe.source, "--kv") == 0);
    }
}

static void test_invalid(void) {
    static const struct {
        const char *text, *says;
    } cases[] = {
        {"", "'' is no KV type"},
        {"k", "missing at character 2"},
        {"k4", "'v' is missing at character 3"},
        {"k4v", "missing at character 4"},
        {"k4x3", "'v' is missing at character 3"},
        {"k4v3x", "left over at character 5"},
        {"k4v3 k8v8", "left over at character 6"},
        {"K4V3", "'K4V3' is no KV type (there are f16 q8 q6 q5 q4 q3 q2) and no pair; a recipe looks like k4v3"},
        {"q7", "'q7' is no KV type"},
        {"k7v3", "no type of 7 bits"},
        {"k16v3", "no type of 16 bits"},
        {"kf8v3", "no type of float 8 bits"},
        {"k99999999999999999999v3", "no type of 1000000 bits"},
        {"k4v3,", "a layer number is missing at character 6"},
        {"k4v3,k8v4", "a layer number is missing at character 6"},
        {"k4v3,0", "':' is missing at character 7"},
        {"k4v3,0-:k8v4", "last layer of a range is missing at character 8"},
        {"k4v3,0:", "'' is no KV type"},
        {"k4v3,0:k8", "'v' is missing at character 10"},
        {"k4v3,4:k8v4", "layers 4-4 do not fit a model of 4 layers (0-3)"},
        {"k4v3,2-4:k8v4", "layers 2-4 do not fit"},
        {"k4v3,2-1:k8v4", "layers 2-1 do not fit"},
        {"k4v3,-1:k8v4", "a layer number is missing at character 6"},
        {"k4v3,0-99999999999999999999:k8v4", "do not fit"},
        {"k4v3\t", "left over at character 5"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (!CHECK_STATUS(KVMIX_ARG, resolve_text(cases[i].text, N_LAYER)) || !CHECK_SAYS(cases[i].says)) {
            fprintf(stderr, "    recipe '%s'\n", cases[i].text);
        }
    }
}

/* The canonical text of any recipe means the same recipe, and is its own canonical text. */
static void test_round_trip(void) {
    static kvm_recipe first;
    static char text[KVM_RECIPE_TEXT_MAX];
    uint32_t random = 1;
    for (int32_t round = 0; round < 300; round++) {
        int32_t n_layer = 1 + round % 97;
        size_t used = (size_t)snprintf(text, sizeof text, "k4v3");
        for (int32_t i = 0; i < n_layer; i++) {
            static const char *const bits[] = {"f16", "8", "4", "3", "2"};
            random = random * 1664525u + 1013904223u;
            if (random >> 24 < 100) continue;
            uint32_t n_kinds = 1 + (uint32_t)round % 5, k = (random >> 16) % n_kinds, v = (random >> 20) % 5;
            used += (size_t)snprintf(text + used, sizeof text - used, ",%d:k%sv%s", i, bits[k], bits[v]);
        }
        if (!CHECK_STATUS(KVMIX_OK, resolve_text(text, n_layer))) return;
        first = recipe;
        if (!CHECK_STATUS(KVMIX_OK, resolve_text(first.text, n_layer))) return;
        CHECK(memcmp(first.k, recipe.k, sizeof first.k) == 0 && memcmp(first.v, recipe.v, sizeof first.v) == 0);
        CHECK(strcmp(first.text, recipe.text) == 0 && strlen(recipe.text) <= used);
    }
    CHECK_STATUS(KVMIX_ARG, resolve_text("k4v3", 0));
    CHECK_STATUS(KVMIX_OK, resolve_text("k4v3,1023:k8v8", KVM_LAYER_MAX));
    CHECK_STATUS(KVMIX_ARG, resolve_text("k4v3", KVM_LAYER_MAX + 1));
}

/* ---- files and precedence ------------------------------------------------------------------------------------- */

static void test_precedence(void) {
    image plain = empty_image(), file = recipe_image(1, "q8 q4 q4 q4", "q4 q3 q3 q2");
    put_int(&file, "kvmix.window", 256);
    put_int(&file, "kvmix.sink", 4);
    put_text(&file, "kvmix.balance", "page");
    kvmix_session_options options = no_options();

    CHECK_STATUS(KVMIX_OK, resolve(&plain, N_LAYER, &options));
    CHECK(strcmp(recipe.source, "default") == 0 && strcmp(recipe.text, "k4v3") == 0);
    CHECK(recipe.window == 128 && recipe.sink == 16 && !recipe.balance_page);

    options.kv_default = "k3v3";
    CHECK_STATUS(KVMIX_OK, resolve(&plain, N_LAYER, &options));
    CHECK(strcmp(recipe.source, "catalog") == 0 && strcmp(recipe.text, "k3v3") == 0);

    CHECK_STATUS(KVMIX_OK, resolve(&file, N_LAYER, &options));
    CHECK(strcmp(recipe.source, "file") == 0 && types_are("q8 q4 q4 q4", "q4 q3 q3 q2"));
    CHECK(recipe.window == 256 && recipe.sink == 4 && recipe.balance_page);

    options.kv = "k2v2";
    options.window = 0; /* 0 is a wish, -1 is none */
    CHECK_STATUS(KVMIX_OK, resolve(&file, N_LAYER, &options));
    CHECK(strcmp(recipe.source, "--kv") == 0 && strcmp(recipe.text, "k2v2") == 0);
    CHECK(recipe.window == 0 && recipe.sink == 4 && !recipe.balance_page); /* the balance belongs to the types */

    options.v_type = "q8_0"; /* one side; the other stays */
    options.sink = 64;
    options.balance_page = 0;
    CHECK_STATUS(KVMIX_OK, resolve(&file, N_LAYER, &options));
    CHECK(strcmp(recipe.source, "-ctk/-ctv") == 0 && strcmp(recipe.text, "k2v8") == 0);
    CHECK(recipe.window == 0 && recipe.sink == 64 && !recipe.balance_page);

    options.k_type = "q7";
    CHECK_STATUS(KVMIX_ARG, resolve(&file, N_LAYER, &options));
    CHECK_SAYS("-ctk: 'q7' is no KV type; there are f16 q8 q6 q5 q4 q3 q2");
}

static void test_ranges(void) {
    image plain = empty_image();
    static const int32_t windows[] = {-2, KVM_WINDOW_MAX + 1}, sinks[] = {-2, 65};
    for (int32_t i = 0; i < 2; i++) {
        kvmix_session_options options = no_options();
        options.window = windows[i];
        CHECK_STATUS(KVMIX_ARG, resolve(&plain, N_LAYER, &options));
        CHECK_SAYS("window");
        options = no_options();
        options.sink = sinks[i];
        CHECK_STATUS(KVMIX_ARG, resolve(&plain, N_LAYER, &options));
        CHECK_SAYS("it takes 0 to 64");
    }
    image file = recipe_image(1, "q4 q4 q4 q4", "q3 q3 q3 q3");
    put_int(&file, "kvmix.sink", 65);
    kvmix_session_options options = no_options();
    CHECK_STATUS(KVMIX_FORMAT, resolve(&file, N_LAYER, &options));
    options.sink = 8; /* what is overridden is not read */
    CHECK_STATUS(KVMIX_OK, resolve(&file, N_LAYER, &options));
}

/* refused, and --kv is the way past it */
static void refuse(const image *file, kvmix_status status, const char *says) {
    kvmix_session_options options = no_options();
    CHECK_STATUS(status, resolve(file, N_LAYER, &options));
    CHECK_SAYS(says);
    options.kv = "k4v4";
    CHECK_STATUS(KVMIX_OK, resolve(file, N_LAYER, &options));
}

static void test_refused_files(void) {
    image file = recipe_image(2, "q4 q4 q4 q4", "q3 q3 q3 q3");
    refuse(&file, KVMIX_UNSUPPORTED, "kvmix.version is 2");
    file = recipe_image(1, "q4 q4 q4", "q3 q3 q3 q3");
    refuse(&file, KVMIX_FORMAT, "kvmix.k_type has 3 entries for 4 layers");
    file = recipe_image(1, "q4 q4 q4 q4", "q3 q3 q9 q3");
    refuse(&file, KVMIX_FORMAT, "kvmix.v_type: 'q9' is no KV type");
    file = recipe_image(1, "q4 q4 q4 q4", NULL);
    refuse(&file, KVMIX_FORMAT, "kvmix.v_type is not");
    file = recipe_image(1, NULL, "q4 q4 q4 q4");
    refuse(&file, KVMIX_FORMAT, "kvmix.k_type is not");
    file = recipe_image(1, "q4 q4 q4 q4", "q3 q3 q3 q3");
    put_text(&file, "kvmix.recipe", "k4v4");
    refuse(&file, KVMIX_FORMAT, "other types than kvmix.k_type");
    file = recipe_image(1, "q4 q4 q4 q4", "q3 q3 q3 q3");
    put_text(&file, "kvmix.recipe", "k4v3,,");
    refuse(&file, KVMIX_FORMAT, "other types than kvmix.k_type");
    file = recipe_image(1, "q4 q4 q4 q4", "q3 q3 q3 q3");
    put_text(&file, "kvmix.balance", "pages");
    kvmix_session_options options = no_options();
    CHECK_STATUS(KVMIX_FORMAT, resolve(&file, N_LAYER, &options));
    CHECK_SAYS("neither 'frozen' nor 'page'");
    file = recipe_image(1, "q8 q4 q4 q4", "q4 q3 q3 q3");
    put_text(&file, "kvmix.recipe", "k4v3, 0:k8v4");
    put_text(&file, "kvmix.balance", "frozen");
    CHECK_STATUS(KVMIX_OK, resolve(&file, N_LAYER, &options));
    CHECK(strcmp(recipe.text, "k4v3,0:k8v4") == 0 && !recipe.balance_page);
}

int main(void) {
    test_valid();
    test_invalid();
    test_round_trip();
    test_precedence();
    test_ranges();
    test_refused_files();
    return check_report();
}
