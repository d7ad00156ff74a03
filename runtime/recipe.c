/* recipe.c - parsing, reading and naming recipes; see recipe.h. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "recipe.h"

#define DEFAULT_RECIPE "k4v3"
enum { RECIPE_VERSION = 1, DEFAULT_WINDOW = 128, DEFAULT_SINK = 16 };

/* ---- names --------------------------------------------------------------------------------------------------- */

/* "f16 q8 q6 q5 q4 q3 q2" */
static const char *type_names(void) {
    static const char names[] =
#define X(id, name, bits, alias) " " name
        KVM_KVTYPE_LIST(X);
#undef X
    return names + 1;
}

static kvmix_status type_from_name(const char *name, size_t n_bytes, const char *where, uint8_t *out) {
    kvm_kvtype type;
    if (!kvm_kvtype_from_name(name, n_bytes, &type)) {
        return kvm_fail(KVMIX_ARG, "%s: '%.*s' is no KV type; there are %s", where, (int)kvm_min((int32_t)n_bytes, 32),
                        name, type_names());
    }
    *out = (uint8_t)type;
    return KVMIX_OK;
}

/* ---- text form ----------------------------------------------------------------------------------------------- */

typedef struct {
    const char *text, *at;
} cursor;

static void skip_spaces(cursor *c) {
    while (*c->at == ' ') c->at++;
}

static bool take(cursor *c, char wanted) {
    skip_spaces(c);
    if (*c->at != wanted) return false;
    c->at++;
    return true;
}

static bool take_number(cursor *c, int32_t *out) {
    skip_spaces(c);
    if (*c->at < '0' || *c->at > '9') return false;
    int32_t value = 0;
    for (; *c->at >= '0' && *c->at <= '9'; c->at++) value = kvm_min(value * 10 + (*c->at - '0'), 1000000);
    *out = value;
    return true;
}

static kvmix_status bad_text(const cursor *c, const char *why) {
    return kvm_fail(KVMIX_ARG, "recipe '%.200s': %s at character %d; it looks like k4v3 or k4v3,0-1:k8v4", c->text, why,
                    (int)(c->at - c->text) + 1);
}

/* the T of k<T>: a number of bits, or f16 */
static kvmix_status take_bits(cursor *c, uint8_t *type) {
    bool is_float = take(c, 'f');
    int32_t bits;
    if (!take_number(c, &bits)) return bad_text(c, "a number of bits is missing");
    for (int32_t t = 0; t < KVM_KVTYPE_COUNT; t++) {
        if (kvm_kvtypes[t].bits == bits && (t == KVM_KVTYPE_F16) == is_float) {
            *type = (uint8_t)t;
            return KVMIX_OK;
        }
    }
    return kvm_fail(KVMIX_ARG, "recipe '%.200s': there is no type of %s%d bits; the types are %s (k4 is q4)", c->text,
                    is_float ? "float " : "", bits, type_names());
}

static kvmix_status take_pair(cursor *c, uint8_t *k, uint8_t *v) {
    skip_spaces(c);
    if (*c->at != 'k') { /* a bare type name */
        size_t n = strcspn(c->at, " ,;:");
        kvm_kvtype type;
        if (!kvm_kvtype_from_name(c->at, n, &type)) {
            return kvm_fail(KVMIX_ARG, "recipe '%.200s': '%.*s' is no KV type (there are %s) and no pair; a recipe looks "
                            "like k4v3 or k4v3,0-1:k8v4", c->text, (int)kvm_min((int32_t)n, 32), c->at, type_names());
        }
        *k = (uint8_t)type;
        *v = *k;
        c->at += n;
        return KVMIX_OK;
    }
    c->at++;
    KVM_TRY(take_bits(c, k));
    if (!take(c, 'v')) return bad_text(c, "'v' is missing");
    return take_bits(c, v);
}

static kvmix_status parse(const char *text, int32_t n_layer, uint8_t *k, uint8_t *v) {
    cursor c = {text, text};
    uint8_t k_type, v_type;
    KVM_TRY(take_pair(&c, &k_type, &v_type));
    memset(k, k_type, (size_t)n_layer);
    memset(v, v_type, (size_t)n_layer);
    while (take(&c, ',') || take(&c, ';')) {
        int32_t from, to;
        if (!take_number(&c, &from)) return bad_text(&c, "a layer number is missing");
        to = from;
        if (take(&c, '-') && !take_number(&c, &to)) return bad_text(&c, "the last layer of a range is missing");
        if (!take(&c, ':')) return bad_text(&c, "':' is missing");
        KVM_TRY(take_pair(&c, &k_type, &v_type));
        if (from > to || to >= n_layer) {
            return kvm_fail(KVMIX_ARG, "recipe '%.200s': layers %d-%d do not fit a model of %d layers (0-%d)", text,
                            from, to, n_layer, n_layer - 1);
        }
        memset(k + from, k_type, (size_t)(to - from + 1));
        memset(v + from, v_type, (size_t)(to - from + 1));
    }
    skip_spaces(&c);
    if (*c.at != 0) return bad_text(&c, "text is left over");
    return KVMIX_OK;
}

static int pair_text(char *out, size_t n, uint8_t k, uint8_t v) {
    const char *k_name = kvm_kvtypes[k].name, *v_name = kvm_kvtypes[v].name; /* "q4" -> "4", "f16" stays */
    return snprintf(out, n, "k%sv%s", k_name + (k_name[0] == 'q'), v_name + (v_name[0] == 'q'));
}

/* 1,024 ranges of at most 20 characters would not fit; such a recipe's text ends early, its arrays are complete */
static void write_text(kvm_recipe *recipe) {
    int32_t count[KVM_KVTYPE_COUNT][KVM_KVTYPE_COUNT] = {{0}}, base = 0;
    for (int32_t i = 0; i < recipe->n_layer; i++) count[recipe->k[i]][recipe->v[i]]++;
    for (int32_t i = 0; i < recipe->n_layer; i++) {
        if (count[recipe->k[i]][recipe->v[i]] > count[recipe->k[base]][recipe->v[base]]) base = i;
    }
    size_t used = (size_t)pair_text(recipe->text, sizeof recipe->text, recipe->k[base], recipe->v[base]);
    for (int32_t i = 0, j; i < recipe->n_layer; i = j) {
        for (j = i + 1; j < recipe->n_layer && recipe->k[j] == recipe->k[i] && recipe->v[j] == recipe->v[i]; j++) {}
        if (recipe->k[i] == recipe->k[base] && recipe->v[i] == recipe->v[base]) continue;
        if (used + 40 > sizeof recipe->text) return;
        char *at = recipe->text + used;
        int n = j - i == 1 ? snprintf(at, 40, ",%d:", i) : snprintf(at, 40, ",%d-%d:", i, j - 1);
        n += pair_text(at + n, (size_t)(40 - n), recipe->k[i], recipe->v[i]);
        used += (size_t)n;
    }
}

/* ---- the sidecar --------------------------------------------------------------------------------------------- */

/* does the sidecar's key say this number? */
static kvmix_status key_says(const kvm_gguf *sidecar, const char *key, uint64_t expected, bool *fits) {
    int64_t value;
    bool found;
    KVM_TRY(kvm_gguf_get_int(sidecar, key, 0, INT64_MAX, &value, &found));
    *fits = *fits && found && (uint64_t)value == expected;
    return KVMIX_OK;
}

/* the header is read only where the size fits: it may have megabytes */
static kvmix_status compare_sidecar(const kvm_gguf *sidecar, const kvm_gguf *model, bool *fits) {
    *fits = true;
    KVM_TRY(key_says(sidecar, "kvmix.sidecar.file_bytes", kvm_gguf_file_bytes(model), fits));
    return *fits ? key_says(sidecar, "kvmix.sidecar.header_crc32", kvm_gguf_header_crc32(model), fits) : KVMIX_OK;
}

kvmix_status kvm_recipe_open_keys(kvm_recipe_keys *out, const kvm_gguf *model) {
    *out = (kvm_recipe_keys){.model = model};
    int64_t version;
    bool found, fits;
    if (kvm_gguf_get_int(model, "kvmix.version", INT64_MIN, INT64_MAX, &version, &found) != KVMIX_OK || found) {
        return KVMIX_OK; /* a version that is no number is refused where the recipe is resolved */
    }
    const char *name = kvm_gguf_name(model);
    size_t n = strlen(name);
    if (n >= 5 && strcmp(name + n - 5, ".gguf") == 0) n -= 5;
    char *path;
    if (asprintf(&path, "%.*s.kvmix.gguf", (int)n, name) < 0) return kvm_fail(KVMIX_NOMEM, "no memory for a path");
    kvmix_status status = KVMIX_OK;
    if (access(path, F_OK) == 0) status = kvm_gguf_open(&out->sidecar, path, false);
    free(path);
    if (status != KVMIX_OK || out->sidecar == NULL) return status;
    status = compare_sidecar(out->sidecar, model, &fits);
    out->is_strange = !fits;
    if (status != KVMIX_OK) kvm_recipe_close_keys(out);
    return status;
}

void kvm_recipe_close_keys(kvm_recipe_keys *keys) {
    kvm_gguf_close(keys->sidecar);
    keys->sidecar = NULL;
}

const kvm_gguf *kvm_recipe_file(const kvm_recipe_keys *keys) {
    return keys->sidecar != NULL && !keys->is_strange ? keys->sidecar : keys->model;
}

/* ---- the file's recipe --------------------------------------------------------------------------------------- */

static kvmix_status read_types(const kvm_gguf *file, const char *key, int32_t n_layer, uint8_t *types, bool *found) {
    kvm_gguf_array array;
    KVM_TRY(kvm_gguf_get_array(file, key, KVM_GGUF_STRING, &array, found));
    if (!*found) return KVMIX_OK;
    if (array.n != (uint64_t)n_layer) {
        return kvm_fail(KVMIX_FORMAT, "%s: %s has %llu entries for %d layers; run with --kv to choose another recipe",
                        kvm_gguf_name(file), key, (unsigned long long)array.n, n_layer);
    }
    kvm_text *names = kvm_alloc((uint64_t)n_layer, sizeof *names);
    if (names == NULL) return kvm_fail(KVMIX_NOMEM, "no memory to read %s", key);
    kvm_gguf_array_texts(&array, names);
    kvmix_status status = KVMIX_OK;
    for (int32_t i = 0; i < n_layer && status == KVMIX_OK; i++) {
        status = type_from_name(names[i].data, names[i].n_bytes, key, &types[i]);
    }
    free(names);
    return status == KVMIX_OK ? KVMIX_OK : KVMIX_FORMAT;
}

static kvmix_status read_file(const kvm_recipe_keys *keys, kvm_recipe *recipe, bool *found) {
    if (keys->is_strange) {
        return kvm_fail(KVMIX_FORMAT, "%.300s was made for another file than %.300s: write it again (python -m kvmix.convert "
                        "annotate --sidecar --force), delete it, or run with --kv to ignore it",
                        kvm_gguf_name(keys->sidecar), kvm_gguf_name(keys->model));
    }
    const kvm_gguf *file = kvm_recipe_file(keys);
    int64_t version;
    KVM_TRY(kvm_gguf_get_int(file, "kvmix.version", 0, INT64_MAX, &version, found));
    if (!*found) return KVMIX_OK;
    if (version != RECIPE_VERSION) {
        return kvm_fail(KVMIX_UNSUPPORTED, "%s: kvmix.version is %lld, this build knows %d; run with --kv to ignore it",
                        kvm_gguf_name(file), (long long)version, RECIPE_VERSION);
    }
    bool has_k, has_v, has_text;
    KVM_TRY(read_types(file, "kvmix.k_type", recipe->n_layer, recipe->k, &has_k));
    KVM_TRY(read_types(file, "kvmix.v_type", recipe->n_layer, recipe->v, &has_v));
    if (!has_k || !has_v) {
        return kvm_fail(KVMIX_FORMAT, "%s: kvmix.version is there but kvmix.%s_type is not; run with --kv to ignore it",
                        kvm_gguf_name(file), has_k ? "v" : "k");
    }
    kvm_text text;
    KVM_TRY(kvm_gguf_get_text(file, "kvmix.recipe", &text, &has_text));
    if (!has_text) return KVMIX_OK;
    char copy[KVM_RECIPE_TEXT_MAX];
    uint8_t k[KVM_LAYER_MAX], v[KVM_LAYER_MAX];
    size_t n = (size_t)recipe->n_layer;
    if (text.n_bytes < sizeof copy) {
        memcpy(copy, text.data, text.n_bytes);
        copy[text.n_bytes] = 0;
        if (parse(copy, recipe->n_layer, k, v) == KVMIX_OK && memcmp(k, recipe->k, n) == 0 &&
            memcmp(v, recipe->v, n) == 0) {
            return KVMIX_OK;
        }
    }
    return kvm_fail(KVMIX_FORMAT, "%s: kvmix.recipe says other types than kvmix.k_type and v_type; run with --kv",
                    kvm_gguf_name(file));
}

/* ---- resolution ---------------------------------------------------------------------------------------------- */

static kvmix_status resolve_types(kvm_recipe *out, const kvm_recipe_keys *keys, const kvmix_session_options *options) {
    bool from_file = false;
    const char *source;
    if (options->kv != NULL) {
        source = options->kv_source != NULL ? options->kv_source : "--kv";
        KVM_TRY(parse(options->kv, out->n_layer, out->k, out->v));
    } else {
        source = keys->sidecar != NULL ? "sidecar" : "file";
        KVM_TRY(read_file(keys, out, &from_file));
        if (!from_file) {
            bool catalog = options->kv_default != NULL;
            source = catalog ? "catalog" : "default";
            KVM_TRY(parse(catalog ? options->kv_default : DEFAULT_RECIPE, out->n_layer, out->k, out->v));
        }
    }
    uint8_t type = 0;
    if (options->k_type != NULL) {
        KVM_TRY(type_from_name(options->k_type, strlen(options->k_type), "-ctk", &type));
        memset(out->k, type, (size_t)out->n_layer);
    }
    if (options->v_type != NULL) {
        KVM_TRY(type_from_name(options->v_type, strlen(options->v_type), "-ctv", &type));
        memset(out->v, type, (size_t)out->n_layer);
    }
    if (options->k_type != NULL || options->v_type != NULL) source = "-ctk/-ctv";
    snprintf(out->source, sizeof out->source, "%s", source);
    return KVMIX_OK;
}

/* the option when it is given (>= 0), else the file's value, else what is there */
static kvmix_status resolve_int(const kvm_gguf *file, const char *key, int32_t option, int32_t high, bool use_file,
                                int32_t *value) {
    if (option < -1 || option > high) {
        return kvm_fail(KVMIX_ARG, "%s %d is out of range; it takes 0 to %d", strchr(key, '.') + 1, option, high);
    }
    if (option >= 0) {
        *value = option;
    } else if (use_file) {
        int64_t found_value;
        bool found;
        KVM_TRY(kvm_gguf_get_int(file, key, 0, high, &found_value, &found));
        if (found) *value = (int32_t)found_value;
    }
    return KVMIX_OK;
}

kvmix_status kvm_recipe_resolve(kvm_recipe *out, const kvm_recipe_keys *keys, int32_t n_layer,
                                const kvmix_session_options *options) {
    const kvm_gguf *file = kvm_recipe_file(keys);
    memset(out, 0, sizeof *out);
    out->n_layer = n_layer;
    out->window = DEFAULT_WINDOW;
    out->sink = DEFAULT_SINK;
    if (n_layer < 1 || n_layer > KVM_LAYER_MAX) return kvm_fail(KVMIX_ARG, "%d layers; 1 to 1024 are possible", n_layer);
    KVM_TRY(resolve_types(out, keys, options));
    int64_t version = 0;
    bool use_file; /* what does not fit was refused above, unless --kv was the way past it */
    kvmix_status status = kvm_gguf_get_int(file, "kvmix.version", 0, INT64_MAX, &version, &use_file);
    use_file = status == KVMIX_OK && use_file && version == RECIPE_VERSION;
    KVM_TRY(resolve_int(file, "kvmix.window", options->window, KVM_WINDOW_MAX, use_file, &out->window));
    KVM_TRY(resolve_int(file, "kvmix.sink", options->sink, KVM_SINK_MAX, use_file, &out->sink));
    if (options->balance_page >= 0) {
        out->balance_page = options->balance_page != 0;
    } else if (use_file && options->kv == NULL) { /* it belongs to the types */
        kvm_text text;
        bool found;
        KVM_TRY(kvm_gguf_get_text(file, "kvmix.balance", &text, &found));
        bool page = found && text.n_bytes == 4 && memcmp(text.data, "page", 4) == 0;
        if (found && !page && !(text.n_bytes == 6 && memcmp(text.data, "frozen", 6) == 0)) {
            return kvm_fail(KVMIX_FORMAT, "%s: kvmix.balance is neither 'frozen' nor 'page'; run with --kv to ignore it",
                            kvm_gguf_name(file));
        }
        out->balance_page = page;
    }
    write_text(out);
    return KVMIX_OK;
}
