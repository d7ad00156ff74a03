/* test_tokenizer.c - the tokenizer on vocabularies small enough to know every id, and on wrong ones.
 *
 * The real vocabularies are test_tokenizer.py's. A vocabulary here is a struct, written to a GGUF file in memory.
 */
#include <stdio.h>
#include <stdlib.h>

#include "check.h"
#include "tokenizer.h"

enum { PLAIN = 1, UNKNOWN = 2, CONTROL = 3, USER = 4, BYTE = 6 }; /* tokenizer.ggml.token_type */

typedef struct {
    const char *text;
    int32_t type;
    float score;
} entry;

typedef struct {
    const char *model, *pre; /* NULL: no such key */
    const entry *entries;
    int32_t n_entries;
    const char *const *merges; /* NULL: no such key */
    int32_t n_merges;
    int32_t bos, eos;             /* -1: no such key */
    int32_t add_bos, space_prefix; /* -1: no such key */
    int32_t n_types, n_scores;    /* where not n_entries; -1: no such key */
    bool wrong_types, wrong_tokens; /* an array of another element type */
} vocabulary;

/* ---- a GGUF file in memory ---------------------------------------------------------------------------------- */

static uint8_t file_bytes[1 << 16];
static size_t n_file;
static uint64_t n_keys;

static void put(const void *data, size_t n) {
    memcpy(&file_bytes[n_file], data, n);
    n_file += n;
}

static void put_u32(uint32_t value) { put(&value, 4); }
static void put_u64(uint64_t value) { put(&value, 8); }

static void put_text(const char *text) {
    put_u64(strlen(text));
    put(text, strlen(text));
}

static void put_key(const char *key, kvm_gguf_type type) {
    put_text(key);
    put_u32(type);
    n_keys++;
}

static void put_array(const char *key, kvm_gguf_type type, int32_t n) {
    put_key(key, KVM_GGUF_ARRAY);
    put_u32(type);
    put_u64((uint64_t)n);
}

static void put_text_key(const char *key, const char *text) {
    if (!text) return;
    put_key(key, KVM_GGUF_STRING);
    put_text(text);
}

static void put_id(const char *key, int32_t id) {
    if (id < 0) return;
    put_key(key, KVM_GGUF_U32);
    put_u32((uint32_t)id);
}

static void put_flag(const char *key, int32_t flag) {
    if (flag < 0) return;
    put_key(key, KVM_GGUF_BOOL);
    put(&(uint8_t){(uint8_t)flag}, 1);
}

static void write_file(const vocabulary *v) {
    n_file = 0;
    n_keys = 0;
    put("GGUF", 4);
    put_u32(3);
    put_u64(0);
    put_u64(0); /* the number of keys, below */
    put_text_key("tokenizer.ggml.model", v->model);
    put_text_key("tokenizer.ggml.pre", v->pre);
    put_array("tokenizer.ggml.tokens", v->wrong_tokens ? KVM_GGUF_I32 : KVM_GGUF_STRING, v->n_entries);
    for (int32_t i = 0; i < v->n_entries; i++)
        if (v->wrong_tokens) put_u32(0);
        else put_text(v->entries[i].text);
    int32_t n_types = v->n_types ? v->n_types : v->n_entries, n_scores = v->n_scores ? v->n_scores : v->n_entries;
    if (n_types > 0) put_array("tokenizer.ggml.token_type", v->wrong_types ? KVM_GGUF_F32 : KVM_GGUF_I32, n_types);
    for (int32_t i = 0; i < n_types; i++) put(&v->entries[i].type, 4);
    if (n_scores > 0) put_array("tokenizer.ggml.scores", KVM_GGUF_F32, n_scores);
    for (int32_t i = 0; i < n_scores; i++) put(&v->entries[i].score, 4);
    if (v->merges) put_array("tokenizer.ggml.merges", KVM_GGUF_STRING, v->n_merges);
    for (int32_t i = 0; v->merges && i < v->n_merges; i++) put_text(v->merges[i]);
    put_id("tokenizer.ggml.bos_token_id", v->bos);
    put_id("tokenizer.ggml.eos_token_id", v->eos);
    put_flag("tokenizer.ggml.add_bos_token", v->add_bos);
    put_flag("tokenizer.ggml.add_space_prefix", v->space_prefix);
    memcpy(&file_bytes[16], &n_keys, 8);
}

static kvm_gguf *file;
static kvm_tokenizer *tokenizer;

static void close_all(void) {
    kvm_tokenizer_close(tokenizer);
    kvm_gguf_close(file);
}

static kvmix_status open_vocabulary(const vocabulary *v) {
    close_all();
    tokenizer = NULL;
    write_file(v);
    KVM_TRY(kvm_gguf_open_memory(&file, file_bytes, n_file, "memory"));
    return kvm_tokenizer_open(&tokenizer, file);
}

/* ---- the vocabularies --------------------------------------------------------------------------------------- */

/* gpt2: ids 0..255 are the bytes, then these */
enum { AB = 256, ABC, BC, SPACE_A, END_OF_TURN, START, START_LONG, TOOL, HIDDEN, WHOLE, ONE_A, B_C1, N_GPT2 };
static char letters[256][4];
static entry gpt2_entries[N_GPT2] = {
    [AB] = {"ab", PLAIN, 0},          [ABC] = {"abc", PLAIN, 0},        [BC] = {"bc", PLAIN, 0},
    [SPACE_A] = {"\xc4\xa0" "a", PLAIN, 0}, [END_OF_TURN] = {"<|im_end|>", PLAIN, 0},
    [START] = {"<s", CONTROL, 0},     [START_LONG] = {"<s>", CONTROL, 0}, [TOOL] = {"<tool>", USER, 0},
    [HIDDEN] = {"xy", CONTROL, 0},    [WHOLE] = {"zzz", PLAIN, 0},      [ONE_A] = {"1a", PLAIN, 0},
    [B_C1] = {"b\xc3\x81", PLAIN, 0},
};
static const char *const gpt2_merges[] = {"b c", "a b", "ab c", "\xc4\xa0 a", "x y", "1 a", "b \xc3\x81"};
static const vocabulary gpt2 = {.model = "gpt2", .pre = "gpt-2", .entries = gpt2_entries, .n_entries = N_GPT2,
                                .merges = gpt2_merges, .n_merges = 7, .bos = START_LONG, .eos = START, .add_bos = -1,
                                .space_prefix = -1};

/* the alphabet in OpenAI's own words: printable bytes are themselves, the others follow from 256 on */
static void spell_letters(void) {
    uint32_t next = 256;
    for (uint32_t byte = 0; byte < 256; byte++) {
        bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
        uint32_t code_point = printable ? byte : next++;
        if (code_point < 0x80) snprintf(letters[byte], 4, "%c", (char)code_point);
        else snprintf(letters[byte], 4, "%c%c", (char)(0xc0 | code_point >> 6), (char)(0x80 | (code_point & 0x3f)));
        gpt2_entries[byte] = (entry){letters[byte], PLAIN, 0};
    }
}

enum { L_UNK, L_BOS, L_EOS, L_BYTE_E9, L_BYTE_A, L_NOT_BYTE, L_MARK, L_A, L_B, L_C, L_AB, L_BC, L_MARK_A, L_TAG, L_B_B,
       N_LLAMA };
static const entry llama_entries[N_LLAMA] = {
    [L_UNK] = {"<unk>", UNKNOWN, 0}, [L_BOS] = {"<s>", CONTROL, 0},       [L_EOS] = {"</s>", CONTROL, 0},
    [L_BYTE_E9] = {"<0xE9>", BYTE, 0}, [L_BYTE_A] = {"<0x61>", BYTE, 0},  [L_NOT_BYTE] = {"<0x-1>", BYTE, -90},
    [L_MARK] = {"\xe2\x96\x81", PLAIN, -9}, [L_A] = {"a", PLAIN, -9},     [L_B] = {"b", PLAIN, -9},
    [L_C] = {"c", PLAIN, -9},        [L_AB] = {"ab", PLAIN, 1},           [L_BC] = {"bc", PLAIN, 2},
    [L_MARK_A] = {"\xe2\x96\x81" "a", PLAIN, -3}, [L_TAG] = {"<tag>", USER, 0}, [L_B_B] = {"bb", PLAIN, -2},
};
static const vocabulary llama = {.model = "llama", .entries = llama_entries, .n_entries = N_LLAMA, .bos = L_BOS,
                                 .eos = L_EOS, .add_bos = -1, .space_prefix = -1};

/* ---- checks ------------------------------------------------------------------------------------------------- */

/* The ids of text, in order, as "1 2 3". */
static const char *ids(const char *text, const uint8_t *trusted, int32_t flags) {
    static char line[512];
    int32_t tokens[64], n = 0;
    line[0] = '\0';
    if (kvm_tokenizer_encode(tokenizer, text, strlen(text), trusted, flags, tokens, 64, &n) != KVMIX_OK)
        return kvmix_last_error();
    for (int32_t i = 0, at = 0; i < n; i++)
        at += snprintf(&line[at], sizeof line - (size_t)at, i ? " %d" : "%d", tokens[i]);
    return line;
}

static bool same(const char *got, const int32_t *want, int32_t n) {
    char line[512] = "";
    for (int32_t i = 0, at = 0; i < n; i++)
        at += snprintf(&line[at], sizeof line - (size_t)at, i ? " %d" : "%d", want[i]);
    if (strcmp(got, line) != 0) fprintf(stderr, "    got %s, wanted %s\n", got, line);
    return strcmp(got, line) == 0;
}

#define CHECK_IDS(got, ...)                                                                                            \
    CHECK(same((got), (const int32_t[]){__VA_ARGS__}, (int32_t)(sizeof(int32_t[]){__VA_ARGS__} / sizeof(int32_t))))

static bool bytes_are(int32_t token, const char *want) {
    char buf[64];
    int32_t n = 0;
    return kvm_tokenizer_bytes(tokenizer, token, buf, sizeof buf, &n) == KVMIX_OK && (size_t)n == strlen(want) &&
           memcmp(buf, want, (size_t)n) == 0;
}

static void test_merges(void) {
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&gpt2));
    CHECK_IDS(ids("abc", NULL, 0), 'a', BC);     /* "b c" ranks above "a b" */
    CHECK_IDS(ids("ababc", NULL, 0), AB, 'a', BC);
    CHECK_IDS(ids(" a a", NULL, 0), SPACE_A, SPACE_A);
    CHECK_IDS(ids("xy", NULL, 0), 'x', 'y');     /* merging makes no control token */
    CHECK_IDS(ids("zzz", NULL, 0), 'z', 'z', 'z'); /* a token that no merge makes */
    CHECK_IDS(ids("b\xc1\xa1", NULL, 0), 'b', 0xc1, 0xa1); /* an overlong "a" is no letter */
    vocabulary v = gpt2;
    v.pre = "llama-bpe"; /* ignores merges, begins every text with bos */
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&v));
    CHECK_IDS(ids("abc", NULL, 0), ABC);
    CHECK_IDS(ids("zzz", NULL, KVMIX_ADD_SPECIAL), START_LONG, WHOLE);
    CHECK_IDS(ids("xy", NULL, 0), 'x', 'y');
    CHECK_IDS(ids("1a", NULL, 0), '1', 'a');     /* a digit leads no word, so the merge never sees the two */
    CHECK(kvm_tokenizer_specials(tokenizer).add_bos);
    v.add_bos = 0;
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&v));
    CHECK_IDS(ids("abc", NULL, KVMIX_ADD_SPECIAL), ABC);
}

static void test_special_tokens(void) {
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&gpt2));
    CHECK_IDS(ids("<s>", NULL, 0), '<', 's', '>');
    CHECK_IDS(ids("<s>a", NULL, KVMIX_PARSE_SPECIAL), START_LONG, 'a'); /* the longest */
    CHECK_IDS(ids("<sa<s", NULL, KVMIX_PARSE_SPECIAL), START, 'a', START);
    CHECK_IDS(ids("a<tool>a", NULL, 0), 'a', TOOL, 'a'); /* user-defined ones always */
    const uint8_t trusted[] = {1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0};
    CHECK_IDS(ids("<s><s><tool>", trusted, KVMIX_PARSE_SPECIAL), START, '>', START_LONG, TOOL);
    CHECK_IDS(ids("<|im_end|>", NULL, KVMIX_PARSE_SPECIAL), END_OF_TURN); /* control, whatever the file says */
    CHECK(kvm_tokenizer_attr(tokenizer, END_OF_TURN) == (KVMIX_TOKEN_CONTROL | KVMIX_TOKEN_END));
    CHECK(kvm_tokenizer_attr(tokenizer, START) == (KVMIX_TOKEN_CONTROL | KVMIX_TOKEN_END)); /* it is eos */
    CHECK(kvm_tokenizer_attr(tokenizer, START_LONG) == KVMIX_TOKEN_CONTROL);
    CHECK(kvm_tokenizer_attr(tokenizer, TOOL) == KVMIX_TOKEN_USER);
    CHECK(kvm_tokenizer_attr(tokenizer, 'a') == 0 && kvm_tokenizer_attr(tokenizer, -1) == 0);
    CHECK(kvm_tokenizer_attr(tokenizer, N_GPT2) == 0 && kvm_tokenizer_n_vocab(tokenizer) == N_GPT2);
    kvm_specials s = kvm_tokenizer_specials(tokenizer);
    CHECK(s.bos == START_LONG && s.eos == START && s.eot == -1 && s.eom == -1 && s.unk == -1 && !s.add_bos);
    CHECK(bytes_are(SPACE_A, " a") && bytes_are(0xad, "\xad") && bytes_are('\n', "\n") && bytes_are(TOOL, "<tool>"));
}

static void test_llama(void) {
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&llama));
    CHECK_IDS(ids("abc", NULL, 0), L_MARK_A, L_BC);            /* 2 before 1 before -3 */
    CHECK_IDS(ids("bbb", NULL, 0), L_MARK, L_B_B, L_B);        /* of equals the left one */
    CHECK_IDS(ids("abb", NULL, 0), L_MARK, L_AB, L_B);         /* 1 before -2 and -3 */
    CHECK_IDS(ids(" a", NULL, 0), L_MARK, L_MARK_A);
    CHECK_IDS(ids("c\xe9", NULL, KVMIX_ADD_SPECIAL), L_BOS, L_MARK, L_C, L_BYTE_E9); /* adds bos by itself */
    CHECK_IDS(ids("\xc3", NULL, 0), L_MARK, L_UNK);            /* a byte that has no token */
    CHECK_IDS(ids("<s>c<tag>c", NULL, KVMIX_PARSE_SPECIAL), L_BOS, L_MARK, L_C, L_TAG, L_MARK, L_C);
    CHECK_IDS(ids("<0x61>", NULL, 0), L_MARK, L_UNK, L_UNK, L_UNK, L_UNK, L_UNK, L_UNK); /* text is no byte token */
    CHECK(bytes_are(L_BYTE_E9, "\xe9") && bytes_are(L_MARK_A, " a") && bytes_are(L_NOT_BYTE, "<0x-1>"));
    CHECK(kvm_tokenizer_attr(tokenizer, L_BYTE_A) == KVMIX_TOKEN_BYTE);
    CHECK(kvm_tokenizer_attr(tokenizer, L_NOT_BYTE) == 0);
    CHECK(kvm_tokenizer_attr(tokenizer, L_UNK) == KVMIX_TOKEN_UNKNOWN);
    CHECK(kvm_tokenizer_specials(tokenizer).unk == L_UNK);
    vocabulary v = llama;
    v.space_prefix = 0;
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&v));
    CHECK_IDS(ids("abc", NULL, 0), L_A, L_BC);
}

static void test_html_tag_is_text(void) {
    entry entries[N_LLAMA];
    memcpy(entries, llama_entries, sizeof entries);
    entries[L_TAG].text = "</s>", entries[L_EOS].text = "<eos>";
    vocabulary v = llama;
    v.entries = entries;
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&v));
    CHECK(kvm_tokenizer_attr(tokenizer, L_TAG) == KVMIX_TOKEN_USER);
    CHECK(kvm_tokenizer_attr(tokenizer, L_EOS) == (KVMIX_TOKEN_CONTROL | KVMIX_TOKEN_END));
}

static void test_arguments(void) {
    int32_t tokens[4], n = -1;
    char buf[2];
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&gpt2));
    CHECK_STATUS(KVMIX_FULL, kvm_tokenizer_encode(tokenizer, "12345", 5, NULL, 0, tokens, 4, &n));
    CHECK(n == 5 && tokens[3] == '4');
    CHECK_STATUS(KVMIX_FULL, kvm_tokenizer_encode(tokenizer, "12345", 5, NULL, 0, NULL, 0, &n));
    CHECK(n == 5);
    CHECK_STATUS(KVMIX_OK, kvm_tokenizer_encode(tokenizer, NULL, 0, NULL, 0, NULL, 0, &n));
    CHECK(n == 0);
    CHECK_STATUS(KVMIX_ARG, kvm_tokenizer_encode(tokenizer, "a", 1, NULL, 0, tokens, -1, &n));
    CHECK_STATUS(KVMIX_ARG, kvm_tokenizer_encode(tokenizer, "a", 1, NULL, 4, tokens, 4, &n));
    CHECK_STATUS(KVMIX_ARG, kvm_tokenizer_encode(tokenizer, NULL, 1, NULL, 0, tokens, 4, &n));
    CHECK_SAYS("text is NULL");
    CHECK_STATUS(KVMIX_ARG, kvm_tokenizer_encode(tokenizer, "a", 1, NULL, 0, NULL, 4, &n));
    CHECK_SAYS("tokens is NULL");
    CHECK_STATUS(KVMIX_ARG, kvm_tokenizer_encode(tokenizer, "a", (size_t)1 << 28, NULL, 0, tokens, 4, &n));
    CHECK_STATUS(KVMIX_FULL, kvm_tokenizer_bytes(tokenizer, ABC, buf, 2, &n));
    CHECK(n == 3);
    CHECK_STATUS(KVMIX_ARG, kvm_tokenizer_bytes(tokenizer, N_GPT2, buf, 2, &n));
    CHECK_STATUS(KVMIX_ARG, kvm_tokenizer_bytes(tokenizer, -1, buf, 2, &n));
    CHECK_STATUS(KVMIX_ARG, kvm_tokenizer_bytes(tokenizer, ABC, NULL, 2, &n));
}

#define CHECK_REFUSED(status, words, base, ...)                                                                        \
    do {                                                                                                               \
        vocabulary v = base;                                                                                           \
        __VA_ARGS__;                                                                                                   \
        CHECK_STATUS(status, open_vocabulary(&v));                                                                     \
        CHECK_SAYS(words);                                                                                             \
        CHECK(tokenizer == NULL);                                                                                      \
    } while (0)

static void test_wrong_vocabularies(void) {
    static const char *const unknown[] = {"a b", "a nothing"}, *const no_space[] = {"ab"}, *const no_right[] = {"a "};
    entry entries[N_LLAMA];
    memcpy(entries, llama_entries, sizeof entries);
    CHECK_REFUSED(KVMIX_FORMAT, "tokenizer.ggml.model is missing", gpt2, v.model = NULL);
    CHECK_REFUSED(KVMIX_UNSUPPORTED, "\"bert\"", gpt2, v.model = "bert");
    CHECK_REFUSED(KVMIX_UNSUPPORTED, "\"tekken\"", gpt2, v.pre = "tekken");
    CHECK_REFUSED(KVMIX_FORMAT, "1 to 4194304", gpt2, v.n_entries = 0; v.n_types = v.n_scores = -1);
    CHECK_REFUSED(KVMIX_FORMAT, "tokenizer.ggml.tokens", gpt2, v.wrong_tokens = true);
    CHECK_REFUSED(KVMIX_FORMAT, "tokenizer.ggml.token_type", gpt2, v.wrong_types = true);
    CHECK_REFUSED(KVMIX_FORMAT, "tokenizer.ggml.token_type has 3 elements", gpt2, v.n_types = 3);
    CHECK_REFUSED(KVMIX_FORMAT, "tokenizer.ggml.scores has 3 elements", llama, v.n_scores = 3);
    CHECK_REFUSED(KVMIX_FORMAT, "tokenizer.ggml.scores is missing", llama, v.n_scores = -1);
    CHECK_REFUSED(KVMIX_FORMAT, "tokenizer.ggml.merges is missing", gpt2, v.merges = NULL);
    CHECK_REFUSED(KVMIX_FORMAT, "merge 1, \"a nothing\"", gpt2, v.merges = unknown; v.n_merges = 2);
    CHECK_REFUSED(KVMIX_FORMAT, "merge 0, \"ab\"", gpt2, v.merges = no_space; v.n_merges = 1);
    CHECK_REFUSED(KVMIX_FORMAT, "merge 0, \"a \"", gpt2, v.merges = no_right; v.n_merges = 1);
    CHECK_REFUSED(KVMIX_FORMAT, "bos_token_id", gpt2, v.bos = N_GPT2);
    CHECK_REFUSED(KVMIX_FORMAT, "eos_token_id", llama, v.eos = INT32_MAX);
    CHECK_REFUSED(KVMIX_FORMAT, "bos_token_id is missing", gpt2, v.bos = -1; v.add_bos = 1);
    CHECK_REFUSED(KVMIX_FORMAT, "type 7", llama, entries[L_A].type = 7; v.entries = entries);
    entries[L_A] = (entry){"a", PLAIN, NAN};
    CHECK_REFUSED(KVMIX_FORMAT, "score of token 7", llama, v.entries = entries);
    entries[L_A] = (entry){"b", PLAIN, 0};
    CHECK_REFUSED(KVMIX_FORMAT, "tokens 7 and 8 are both \"b\"", llama, v.entries = entries);
    entries[L_A] = (entry){"", PLAIN, 0}, entries[L_B] = (entry){"", CONTROL, 0}; /* holes are allowed */
    vocabulary v = llama;
    v.entries = entries;
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&v));
    CHECK_IDS(ids("c", NULL, KVMIX_PARSE_SPECIAL), L_MARK, L_C);
    CHECK(bytes_are(L_A, ""));
    v = gpt2;
    v.pre = NULL; /* "default" */
    v.n_types = v.n_scores = -1;
    CHECK_STATUS(KVMIX_OK, open_vocabulary(&v));
    CHECK_IDS(ids("1234", NULL, 0), '1', '2', '3', '4');
}

/* Every byte string comes back, whatever the split rule: bytes at random, and bytes that the rules look at. */
static void test_random_bytes(void) {
    static const char *const names[] = {"default", "gpt-2", "llama-bpe", "qwen2", "smollm"};
    static const char looked_at[] = "ab c\n\r\t'sSdDvVeE019$<tool>\xc2\xa0\xe2\x80\xa8\xc5\xbf\xd9\xa1\xe6\x95\xb0";
    uint32_t random = 1;
    for (int32_t rule = 0; rule < 5; rule++) {
        vocabulary v = gpt2;
        v.pre = names[rule];
        CHECK_STATUS(KVMIX_OK, open_vocabulary(&v));
        int32_t n_wrong = 0;
        for (int32_t round = 0; round < 20000; round++) {
            char text[24], back[24 * 16];
            int32_t tokens[24], n = 0, n_back = 0;
            uint32_t n_text = (random >> 8) % sizeof text;
            for (uint32_t i = 0; i < n_text; i++) {
                random = random * 1664525 + 1013904223;
                text[i] = round % 2 ? (char)(random >> 24) : looked_at[(random >> 16) % (sizeof looked_at - 1)];
            }
            random = random * 1664525 + 1013904223;
            kvmix_status status = kvm_tokenizer_encode(tokenizer, text, n_text, NULL, 0, tokens, 24, &n);
            for (int32_t i = 0, n_piece; status == KVMIX_OK && i < n; i++, n_back += n_piece)
                status = kvm_tokenizer_bytes(tokenizer, tokens[i], &back[n_back], 16, &n_piece);
            n_wrong += status != KVMIX_OK || (uint32_t)n_back != n_text || memcmp(text, back, n_text) != 0;
        }
        CHECK(n_wrong == 0);
    }
}

/* Whatever the file says, open refuses it or the tokenizer works; the sanitizers watch. */
static void test_mutants(void) {
    static const vocabulary *const bases[] = {&gpt2, &llama};
    uint32_t random = 2;
    int32_t n_opened = 0, n_refused = 0;
    for (int32_t round = 0; round < 20000; round++) {
        close_all();
        tokenizer = NULL;
        write_file(bases[round % 2]);
        for (int32_t i = 0; i < 1 + round % 3; i++) {
            random = random * 1664525 + 1013904223;
            file_bytes[24 + (random >> 8) % (n_file - 24)] ^= (uint8_t)(1u << (random & 7));
        }
        kvmix_status status = kvm_gguf_open_memory(&file, file_bytes, n_file, "memory");
        if (status == KVMIX_OK) status = kvm_tokenizer_open(&tokenizer, file);
        if (status != KVMIX_OK) {
            n_refused++;
            continue;
        }
        n_opened++;
        ids("abc <s>1a\xe9<tool>\n xyzzz", NULL, KVMIX_ADD_SPECIAL | KVMIX_PARSE_SPECIAL);
        for (int32_t id = 0; id < kvm_tokenizer_n_vocab(tokenizer); id += 7) bytes_are(id, "");
    }
    CHECK(n_opened > 1000 && n_refused > 1000);
}

int main(void) {
    spell_letters();
    test_merges();
    test_special_tokens();
    test_llama();
    test_html_tag_is_text();
    test_arguments();
    test_wrong_vocabularies();
    test_random_bytes();
    test_mutants();
    close_all();
    return check_report();
}
