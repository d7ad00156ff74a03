/* tokenizer.c - text <-> token ids: byte-level BPE ("gpt2") and SentencePiece-style BPE ("llama").
 *
 * Text goes through four steps. *Partition*: special tokens written in the text are cut out, the longest at the
 * leftmost place first. *Split* (gpt2 only): the rest is cut into words by a pre-tokenizer, a row of `split_rules`.
 * *Spell*: a word, or a whole llama fragment, is written as the vocabulary writes it, one symbol a character.
 * *Merge*: the best pair of neighbours becomes one symbol until no pair is left. Both algorithms share the merge loop;
 * they differ in `find_pair`: gpt2 knows a pair of ids by its merge, llama knows the joined text by its token's score.
 *
 * Invariants
 * 1. Nothing here is written after open; encode works in memory of its own call.
 * 2. Merging never makes a control, unknown or byte token: only partition does, and only from trusted text.
 * 3. Each byte of the text lies in exactly one special token or one symbol.
 * 4. The hash tables start from `seed`, which differs from run to run, so that no file can be built to collide.
 *
 * The byte alphabet of gpt2 spells each byte as one code point: printable bytes as themselves, the other 68 from
 * U+0100 on in order, so that a token's text never holds a space or a control character.
 */
#include <stdio.h>
#include <stdlib.h>

#include "tokenizer.h"
#include "unicode_tables.h"

enum { MAX_TEXT_BYTES = (1 << 28) - 1, MAX_VOCAB = 4194304 };

/* what text never becomes by merging */
enum { RESERVED = KVMIX_TOKEN_CONTROL | KVMIX_TOKEN_UNKNOWN | KVMIX_TOKEN_BYTE };

#define SPACE_MARK "\xe2\x96\x81" /* U+2581, llama's spelling of a space */

typedef struct {
    uint32_t hash;
    int32_t id_plus_1; /* 0: free */
} text_slot;

typedef struct {
    uint64_t pair_plus_1; /* left id << 32 | right id, plus 1; 0: free */
    uint32_t rank;
    int32_t result;
} merge_slot;

typedef struct {
    kvm_text text;
    int32_t id;
} special_token;

typedef enum { DIGITS_RUN /* may follow a space */, DIGITS_ONE, DIGITS_UP_TO_3, DIGITS_ASCII_TRIPLES } digit_rule;
typedef enum { ISOLATE_NOTHING, ISOLATE_NUMBERS, ISOLATE_PUNCTUATION } isolate_rule;

typedef struct {
    const char *name; /* tokenizer.ggml.pre */
    bool cl100k;      /* letters take any one character before them, symbols the newlines after them; else gpt-2 */
    digit_rule digits;
    isolate_rule isolate; /* runs of these are cut out before anything else looks at the text */
    bool ignore_merges;   /* a word that is a token is that token, whatever its merges say */
    bool add_bos;         /* where the file has no tokenizer.ggml.add_bos_token */
} split_rule;

static const split_rule split_rules[] = {
    {"default", false, DIGITS_ASCII_TRIPLES, ISOLATE_PUNCTUATION, false, false},
    {"gpt-2", false, DIGITS_RUN, ISOLATE_NOTHING, false, false},
    {"llama-bpe", true, DIGITS_UP_TO_3, ISOLATE_NOTHING, true, true},
    {"qwen2", true, DIGITS_ONE, ISOLATE_NOTHING, false, false},
    {"smollm", false, DIGITS_ONE, ISOLATE_NUMBERS, false, false},
};
enum { N_SPLIT_RULES = sizeof split_rules / sizeof split_rules[0] };

struct kvm_tokenizer {
    const char *file_name;
    const split_rule *rule; /* NULL: llama */
    bool add_space_prefix; /* llama: to every run of text between special tokens */
    int32_t n_vocab;
    kvm_specials specials;
    kvm_text *text;      /* [n_vocab] into the mapping */
    uint8_t *attr;       /* [n_vocab] KVMIX_TOKEN_* */
    uint32_t *priority;  /* [n_vocab] llama: the score, so that the better of two is the smaller number */
    size_t longest_text; /* bytes of the longest token */
    int32_t byte_token[256]; /* -1 where the vocabulary has none */
    uint64_t seed;
    text_slot *by_text; /* [text_mask + 1] open addressing */
    merge_slot *merges; /* [merge_mask + 1] gpt2, likewise */
    uint64_t text_mask, merge_mask;
    special_token *special; /* [n_special] sorted by bytes */
    int32_t n_special;
    int32_t special_first[257]; /* those that begin with byte b are special[special_first[b] .. special_first[b + 1]) */
};

/* ---- hashing ----------------------------------------------------------------------------------------------- */

/* FNV-1a, continued: hash_bytes(hash_bytes(seed, a), b) is the hash of a and b joined */
static uint64_t hash_bytes(uint64_t hash, kvm_text text) {
    for (size_t i = 0; i < text.n_bytes; i++) hash = (hash ^ (uint8_t)text.data[i]) * 0x100000001b3u;
    return hash;
}

static uint64_t hash_pair(uint64_t seed, uint64_t pair) {
    uint64_t hash = (pair ^ seed) * 0x9e3779b97f4a7c15u;
    hash = (hash ^ (hash >> 32)) * 0xd6e8feb86659fd93u;
    return hash ^ (hash >> 32);
}

/* a power of two with room to spare, so that every probe soon ends at a free slot */
static uint64_t table_size(uint64_t n) {
    uint64_t size = 4;
    while (size <= n + n / 2) size *= 2;
    return size;
}

/* The slot of the token spelled left + right, or the free one where it belongs. */
static text_slot *find_slot(const kvm_tokenizer *t, kvm_text left, kvm_text right, uint32_t *hash) {
    uint64_t full = hash_bytes(hash_bytes(t->seed, left), right);
    *hash = (uint32_t)(full ^ (full >> 32));
    for (uint64_t i = *hash;; i++) {
        text_slot *slot = &t->by_text[i & t->text_mask];
        if (slot->id_plus_1 == 0) return slot;
        if (slot->hash != *hash) continue;
        kvm_text text = t->text[slot->id_plus_1 - 1];
        if (text.n_bytes == left.n_bytes + right.n_bytes && memcmp(text.data, left.data, left.n_bytes) == 0 &&
            memcmp(text.data + left.n_bytes, right.data, right.n_bytes) == 0)
            return slot;
    }
}

/* -1 when no token is spelled left + right */
static int32_t find_joined(const kvm_tokenizer *t, kvm_text left, kvm_text right) {
    uint32_t hash;
    return find_slot(t, left, right, &hash)->id_plus_1 - 1;
}

static int32_t find_text(const kvm_tokenizer *t, const char *data, size_t n_bytes) {
    return find_joined(t, (kvm_text){data, n_bytes}, (kvm_text){"", 0});
}

static uint64_t pair_of(int32_t left, int32_t right) { return (uint64_t)(uint32_t)left << 32 | (uint32_t)right; }

/* the slot of the merge of two tokens, or the free one where it belongs */
static merge_slot *find_merge(const kvm_tokenizer *t, int32_t left, int32_t right) {
    uint64_t pair = pair_of(left, right);
    for (uint64_t i = hash_pair(t->seed, pair);; i++) {
        merge_slot *slot = &t->merges[i & t->merge_mask];
        if (slot->pair_plus_1 == 0 || slot->pair_plus_1 == pair + 1) return slot;
    }
}

static bool same_text(kvm_text text, const char *name) {
    return text.n_bytes == strlen(name) && memcmp(text.data, name, text.n_bytes) == 0;
}

/* ---- characters -------------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t code_point;
    int32_t n_bytes; /* 0: past the end */
    kvm_unicode_class class;
} character;

static kvm_unicode_class class_of(uint32_t code_point) {
    int32_t low = 0, high = kvm_unicode_n_ranges;
    while (high - low > 1) {
        int32_t middle = (low + high) / 2;
        if (kvm_unicode_ranges[middle] >> 3 <= code_point) low = middle;
        else high = middle;
    }
    return (kvm_unicode_class)(kvm_unicode_ranges[low] & 7);
}

/* The character at p; a byte that begins no valid UTF-8 sequence is a character of class OTHER on its own. Surrogates
 * and numbers past U+10FFFF need no check: they are of that class too. */
static character character_at(const uint8_t *p, const uint8_t *end) {
    static const uint32_t lowest[5] = {0, 0, 0x80, 0x800, 0x10000};
    if (p == end) return (character){0, 0, KVM_UNICODE_OTHER};
    uint32_t code_point = *p;
    if (code_point < 0x80) return (character){code_point, 1, class_of(code_point)};
    int32_t n = code_point >= 0xf0 ? 4 : code_point >= 0xe0 ? 3 : 2;
    const character invalid = {0xfffd, 1, KVM_UNICODE_OTHER};
    if (code_point < 0xc0 || code_point > 0xf7 || end - p < n) return invalid;
    code_point &= 0x7fu >> n;
    for (int32_t i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80) return invalid;
        code_point = code_point << 6 | (p[i] & 0x3fu);
    }
    return code_point < lowest[n] ? invalid : (character){code_point, n, class_of(code_point)};
}

static uint32_t alphabet_of_byte(uint32_t byte) {
    if (byte <= 0x20) return 0x100 + byte;
    if (byte >= 0x7f && byte <= 0xa0) return 0x121 + (byte - 0x7f);
    return byte == 0xad ? 0x143 : byte;
}

/* The letter of a byte as UTF-8, 1 or 2 bytes; returns how many. */
static uint32_t spell_byte(uint32_t byte, char *out) {
    uint32_t code_point = alphabet_of_byte(byte);
    if (code_point < 0x80) {
        out[0] = (char)code_point;
        return 1;
    }
    out[0] = (char)(0xc0 | code_point >> 6);
    out[1] = (char)(0x80 | (code_point & 0x3f));
    return 2;
}

/* -1 when the code point is not in the alphabet */
static int32_t byte_of_alphabet(uint32_t code_point) {
    uint32_t byte = code_point;
    if (code_point >= 0x100) byte = code_point <= 0x120 ? code_point - 0x100 : code_point - 0x121 + 0x7f;
    if (code_point == 0x143) byte = 0xad;
    return byte < 0x100 && alphabet_of_byte(byte) == code_point ? (int32_t)byte : -1;
}

/* ---- pre-tokenizers ---------------------------------------------------------------------------------------- */
/* Each match_* returns the end of what one alternative of the split expression matches at p, or p where it does not
 * match. `end` is the end of the text as far as lookahead is concerned. */

enum { LETTERS = 1 << KVM_UNICODE_LETTER, NUMBERS = 1 << KVM_UNICODE_NUMBER,
       SYMBOLS = 1 << KVM_UNICODE_OTHER | 1 << KVM_UNICODE_PUNCTUATION };

static bool is_newline(uint32_t code_point) { return code_point == '\r' || code_point == '\n'; }

/* past the run of characters whose classes are in `classes` */
static const uint8_t *skip(const uint8_t *p, const uint8_t *end, int32_t classes) {
    for (character c = character_at(p, end); c.n_bytes && classes >> c.class & 1; c = character_at(p, end))
        p += c.n_bytes;
    return p;
}

/* 's|'t|'re|'ve|'m|'ll|'d, in any case for cl100k */
static const uint8_t *match_contraction(const split_rule *rule, const uint8_t *p, const uint8_t *end) {
    static const char *const tails[] = {"s", "t", "re", "ve", "m", "ll", "d"};
    if (*p != '\'') return p;
    for (size_t i = 0; i < sizeof tails / sizeof tails[0]; i++) {
        const uint8_t *q = p + 1;
        const char *tail = tails[i];
        for (; *tail && q != end; tail++) {
            character c = character_at(q, end);
            uint32_t folded = c.code_point;
            if (rule->cl100k && folded >= 'A' && folded <= 'Z') folded += 'a' - 'A';
            if (folded != (uint8_t)*tail) break;
            q += c.n_bytes;
        }
        if (*tail == '\0') return q;
    }
    return p;
}

/* cl100k: [^\r\n\p{L}\p{N}]?\p{L}+; gpt-2: " ?\p{L}+" */
static const uint8_t *match_letters(const split_rule *rule, const uint8_t *p, const uint8_t *end) {
    character lead = character_at(p, end);
    bool may_lead = rule->cl100k ? !(NUMBERS >> lead.class & 1) && !is_newline(lead.code_point)
                                 : lead.code_point == ' ';
    const uint8_t *q = lead.class != KVM_UNICODE_LETTER && may_lead ? p + lead.n_bytes : p;
    const uint8_t *letters_end = skip(q, end, LETTERS);
    return letters_end == q ? p : letters_end;
}

static bool is_ascii_triple(const uint8_t *p, const uint8_t *end) {
    if (end - p < 3) return false;
    for (int32_t i = 0; i < 3; i++)
        if (p[i] < '0' || p[i] > '9') return false;
    return true;
}

static const uint8_t *match_digits(const split_rule *rule, const uint8_t *p, const uint8_t *end) {
    if (rule->digits == DIGITS_RUN) { /* " ?\p{N}+" */
        const uint8_t *q = p + (*p == ' ');
        const uint8_t *digits_end = skip(q, end, NUMBERS);
        return digits_end == q ? p : digits_end;
    }
    if (rule->digits == DIGITS_ASCII_TRIPLES && is_ascii_triple(p, end)) return p + 3;
    int32_t n_most = rule->digits == DIGITS_ONE ? 1 : rule->digits == DIGITS_UP_TO_3 ? 3 : INT32_MAX;
    for (int32_t n = 0; n < n_most; n++) {
        character c = character_at(p, end);
        if (!c.n_bytes || c.class != KVM_UNICODE_NUMBER) break;
        if (n > 0 && rule->digits == DIGITS_ASCII_TRIPLES && is_ascii_triple(p, end)) break;
        p += c.n_bytes;
    }
    return p;
}

/* " ?[^\s\p{L}\p{N}]+", for cl100k followed by [\r\n]* */
static const uint8_t *match_symbols(const split_rule *rule, const uint8_t *p, const uint8_t *end) {
    const uint8_t *q = p + (*p == ' ');
    const uint8_t *symbols_end = skip(q, end, SYMBOLS);
    if (symbols_end == q) return p;
    while (rule->cl100k && symbols_end != end && is_newline(*symbols_end)) symbols_end++;
    return symbols_end;
}

/* cl100k: \s*[\r\n]+; both: \s+(?!\S)|\s+ */
static const uint8_t *match_spaces(const split_rule *rule, const uint8_t *p, const uint8_t *end) {
    const uint8_t *q = p, *last = p, *newline_end = p;
    for (character c = character_at(p, end); c.n_bytes && c.class == KVM_UNICODE_SPACE; c = character_at(q, end)) {
        last = q;
        q += c.n_bytes;
        if (is_newline(c.code_point)) newline_end = q;
    }
    if (rule->cl100k && newline_end != p) return newline_end;
    return q != end && last != p ? last : q; /* the last space before a word belongs to the word */
}

static const uint8_t *word_end(const split_rule *rule, const uint8_t *p, const uint8_t *end) {
    const uint8_t *q = match_contraction(rule, p, end);
    if (q == p) q = match_letters(rule, p, end);
    if (q == p) q = match_digits(rule, p, end);
    if (q == p) q = match_symbols(rule, p, end);
    return q == p ? match_spaces(rule, p, end) : q;
}

static bool is_isolated(const split_rule *rule, character c) {
    if (rule->isolate == ISOLATE_NUMBERS) return c.class == KVM_UNICODE_NUMBER;
    return c.class == KVM_UNICODE_PUNCTUATION || (c.code_point && c.code_point < 0x80 &&
                                                  strchr("$+<=>^~|", (int)c.code_point));
}

/* the end of the run that is isolated, or not, as its first character is */
static const uint8_t *segment_end(const split_rule *rule, const uint8_t *p, const uint8_t *end) {
    if (rule->isolate == ISOLATE_NOTHING) return end;
    character c = character_at(p, end);
    bool isolated = is_isolated(rule, c);
    while (c.n_bytes && is_isolated(rule, c) == isolated) {
        p += c.n_bytes;
        c = character_at(p, end);
    }
    return p;
}

/* ---- merging ----------------------------------------------------------------------------------------------- */

typedef struct {
    uint32_t at, n_bytes; /* spelling[at .. at + n_bytes); n_bytes 0: merged into a symbol on the left */
    int32_t id;           /* -1: no token is spelled so */
    int32_t prev, next;   /* -1: none */
} symbol;

typedef struct {
    uint32_t priority; /* the smaller merges first; of equals, the one on the left */
    int32_t id;
} candidate;

typedef struct {
    const kvm_tokenizer *t;
    int32_t *tokens; /* [n_max] */
    int32_t n_max, n_tokens; /* n_tokens counts past n_max */
    size_t n_room;   /* symbols that the arrays below can hold */
    symbol *symbols; /* [n_room] */
    uint64_t *heap;  /* [2 * n_room] priority << 32 | left symbol: a merge takes one out and puts at most two in */
    char *spelling;  /* [4 * n_room] */
    int32_t n_symbols;
    size_t n_heap, n_spelled;
} encoder;

static void emit(encoder *e, int32_t id) {
    if (e->n_tokens < e->n_max) e->tokens[e->n_tokens] = id;
    e->n_tokens++;
}

static void free_room(encoder *e) {
    free(e->symbols);
    free(e->heap);
    free(e->spelling);
}

/* Empties the encoder and makes room for n symbols. */
static kvmix_status reserve(encoder *e, size_t n) {
    e->n_symbols = 0;
    e->n_spelled = 0;
    if (n <= e->n_room) return KVMIX_OK;
    free_room(e);
    e->n_room = n + n / 2 + 64;
    e->symbols = kvm_alloc(e->n_room, sizeof *e->symbols);
    e->heap = kvm_alloc(e->n_room, 2 * sizeof *e->heap);
    e->spelling = kvm_alloc(e->n_room, 4);
    if (e->symbols && e->heap && e->spelling) return KVMIX_OK;
    return kvm_fail(KVMIX_NOMEM, "no memory to tokenize a run of %zu bytes; pass the text in pieces", n);
}

static void add_symbol(encoder *e, const char *bytes, uint32_t n_bytes, int32_t id) {
    e->symbols[e->n_symbols] = (symbol){(uint32_t)e->n_spelled, n_bytes, id, e->n_symbols - 1, e->n_symbols + 1};
    memcpy(&e->spelling[e->n_spelled], bytes, n_bytes);
    e->n_spelled += n_bytes;
    e->n_symbols++;
}

/* the token that text may become outside partition, else -1 */
static int32_t find_plain(const kvm_tokenizer *t, const char *data, size_t n_bytes) {
    if (n_bytes > t->longest_text) return -1;
    int32_t id = find_text(t, data, n_bytes);
    return id >= 0 && (t->attr[id] & RESERVED) ? -1 : id;
}

/* What symbol `left` and its right neighbour merge into. */
static bool find_pair(const encoder *e, int32_t left, candidate *out) {
    const symbol *a = &e->symbols[left];
    if (a->next < 0) return false;
    const symbol *b = &e->symbols[a->next];
    if (e->t->rule) {
        if (a->id < 0 || b->id < 0) return false;
        const merge_slot *merge = find_merge(e->t, a->id, b->id);
        *out = (candidate){merge->rank, merge->result};
        return merge->pair_plus_1 != 0;
    }
    int32_t id = find_plain(e->t, &e->spelling[a->at], a->n_bytes + b->n_bytes);
    if (id < 0) return false;
    *out = (candidate){e->t->priority[id], id};
    return true;
}

static void push_pair(encoder *e, int32_t left) {
    candidate found;
    if (left < 0 || !find_pair(e, left, &found)) return;
    uint64_t key = (uint64_t)found.priority << 32 | (uint32_t)left;
    size_t i = e->n_heap++;
    for (; i > 0 && e->heap[(i - 1) / 2] > key; i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = key;
}

static uint64_t pop_pair(encoder *e) {
    uint64_t top = e->heap[0], key = e->heap[--e->n_heap];
    size_t i = 0;
    for (size_t child = 1; child < e->n_heap; child = 2 * i + 1) {
        if (child + 1 < e->n_heap && e->heap[child + 1] < e->heap[child]) child++;
        if (e->heap[child] >= key) break;
        e->heap[i] = e->heap[child];
        i = child;
    }
    e->heap[i] = key;
    return top;
}

static void merge_symbols(encoder *e) {
    e->n_heap = 0;
    e->symbols[e->n_symbols - 1].next = -1;
    for (int32_t i = 0; i + 1 < e->n_symbols; i++) push_pair(e, i);
    while (e->n_heap > 0) {
        uint64_t key = pop_pair(e);
        int32_t left = (int32_t)(uint32_t)key;
        candidate found;
        /* an entry outlives its pair; it counts if what stands there now would have made the same entry */
        if (!e->symbols[left].n_bytes || !find_pair(e, left, &found) || found.priority != key >> 32) continue;
        symbol *a = &e->symbols[left], *b = &e->symbols[a->next];
        a->n_bytes += b->n_bytes;
        a->id = found.id;
        a->next = b->next;
        b->n_bytes = 0;
        if (a->next >= 0) e->symbols[a->next].prev = left;
        push_pair(e, a->prev);
        push_pair(e, left);
    }
}

/* ---- encoding ---------------------------------------------------------------------------------------------- */

/* A byte that is no token is dropped, as llama.cpp does: a vocabulary's unknown token may well be a control token. */
static kvmix_status encode_word(encoder *e, const uint8_t *p, const uint8_t *end) {
    const kvm_tokenizer *t = e->t;
    KVM_TRY(reserve(e, (size_t)(end - p)));
    for (; p != end; p++) {
        char letter[2];
        uint32_t n_bytes = spell_byte(*p, letter);
        add_symbol(e, letter, n_bytes, t->byte_token[*p]);
    }
    int32_t whole = t->rule->ignore_merges ? find_plain(t, e->spelling, e->n_spelled) : -1;
    if (whole >= 0) {
        emit(e, whole);
        return KVMIX_OK;
    }
    merge_symbols(e);
    for (int32_t i = 0; i >= 0; i = e->symbols[i].next)
        if (e->symbols[i].id >= 0) emit(e, e->symbols[i].id);
    return KVMIX_OK;
}

static kvmix_status encode_words(encoder *e, const uint8_t *p, const uint8_t *end) {
    const split_rule *rule = e->t->rule;
    while (p != end) {
        for (const uint8_t *segment = segment_end(rule, p, end), *word; p != segment; p = word) {
            word = word_end(rule, p, segment);
            KVM_TRY(encode_word(e, p, word));
        }
    }
    return KVMIX_OK;
}

/* The llama algorithm: spaces become U+2581, what no token spells goes byte by byte. */
static kvmix_status encode_pieces(encoder *e, const uint8_t *p, const uint8_t *end) {
    const kvm_tokenizer *t = e->t;
    const uint32_t mark_bytes = sizeof SPACE_MARK - 1;
    int32_t mark = find_plain(t, SPACE_MARK, mark_bytes);
    KVM_TRY(reserve(e, (size_t)(end - p) + 1));
    if (t->add_space_prefix) add_symbol(e, SPACE_MARK, mark_bytes, mark);
    while (p != end) {
        const char *bytes = (const char *)p;
        uint32_t n_bytes = (uint32_t)character_at(p, end).n_bytes;
        if (*p == ' ') add_symbol(e, SPACE_MARK, mark_bytes, mark);
        else add_symbol(e, bytes, n_bytes, find_plain(t, bytes, n_bytes));
        p += n_bytes;
    }
    merge_symbols(e);
    for (int32_t i = 0; i >= 0; i = e->symbols[i].next) {
        const symbol *s = &e->symbols[i];
        if (s->id >= 0) {
            emit(e, s->id);
            continue;
        }
        for (uint32_t j = 0; j < s->n_bytes; j++) {
            int32_t id = t->byte_token[(uint8_t)e->spelling[s->at + j]];
            if (id >= 0) emit(e, id);
        }
    }
    return KVMIX_OK;
}

/* the first of special[low .. high), all alike before byte `depth`, whose byte there is at least `byte` */
static int32_t first_at_least(const special_token *special, int32_t low, int32_t high, size_t depth, int32_t byte) {
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if ((uint8_t)special[middle].text.data[depth] < byte) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* The longest special token that begins at text[0] and may be recognized there, or NULL. A control or unknown token
 * needs n_trusted bytes of trusted text from there on. */
static const special_token *special_at(const kvm_tokenizer *t, const uint8_t *text, size_t n_bytes, size_t n_trusted) {
    const special_token *longest = NULL;
    int32_t low = t->special_first[text[0]], high = t->special_first[text[0] + 1];
    for (size_t depth = 1; low < high; depth++) {
        const special_token *shortest = &t->special[low]; /* it sorts before those that it begins */
        if (shortest->text.n_bytes == depth) {
            if (depth <= n_trusted || (t->attr[shortest->id] & KVMIX_TOKEN_USER)) longest = shortest;
            low++;
        }
        if (depth == n_bytes) break;
        low = first_at_least(t->special, low, high, depth, text[depth]);
        high = first_at_least(t->special, low, high, depth, text[depth] + 1);
    }
    return longest;
}

static kvmix_status encode_text(encoder *e, const uint8_t *text, size_t n_bytes, const uint8_t *trusted, bool parse) {
    const kvm_tokenizer *t = e->t;
    size_t start = 0, at = 0, trusted_end = 0;
    while (start < n_bytes) {
        const special_token *found = NULL;
        for (; at < n_bytes; at++) {
            if (t->special_first[text[at]] == t->special_first[text[at] + 1]) continue;
            if (trusted_end < at) trusted_end = at;
            while (parse && trusted_end < n_bytes && (!trusted || trusted[trusted_end])) trusted_end++;
            found = special_at(t, &text[at], n_bytes - at, trusted_end - at);
            if (found) break;
        }
        if (at > start) {
            if (t->rule) KVM_TRY(encode_words(e, &text[start], &text[at]));
            else KVM_TRY(encode_pieces(e, &text[start], &text[at]));
        }
        if (found) {
            emit(e, found->id);
            at += found->text.n_bytes;
        }
        start = at;
    }
    return KVMIX_OK;
}

kvmix_status kvm_tokenizer_encode(const kvm_tokenizer *tokenizer, const char *text, size_t n_bytes,
                                  const uint8_t *trusted, int32_t flags, int32_t *tokens, int32_t n_max,
                                  int32_t *n_tokens) {
    *n_tokens = 0;
    if (n_bytes > MAX_TEXT_BYTES)
        return kvm_fail(KVMIX_ARG, "the text has %zu bytes, the limit is %d; pass it in pieces", n_bytes,
                        MAX_TEXT_BYTES);
    if (n_max < 0) return kvm_fail(KVMIX_ARG, "n_max is %d, it must not be negative", n_max);
    if ((!text && n_bytes) || (!tokens && n_max))
        return kvm_fail(KVMIX_ARG, "%s is NULL but its size is not 0", text || !n_bytes ? "tokens" : "text");
    if (flags & ~(KVMIX_ADD_SPECIAL | KVMIX_PARSE_SPECIAL))
        return kvm_fail(KVMIX_ARG, "flags is %d; only KVMIX_ADD_SPECIAL and KVMIX_PARSE_SPECIAL are defined", flags);

    encoder e = {.t = tokenizer, .tokens = tokens, .n_max = n_max};
    bool add = flags & KVMIX_ADD_SPECIAL, parse = flags & KVMIX_PARSE_SPECIAL;
    if (add && tokenizer->specials.add_bos) emit(&e, tokenizer->specials.bos);
    kvmix_status status = encode_text(&e, (const uint8_t *)text, n_bytes, trusted, parse);
    if (add && tokenizer->specials.add_eos) emit(&e, tokenizer->specials.eos);
    free_room(&e);
    KVM_TRY(status);
    *n_tokens = e.n_tokens;
    if (e.n_tokens > n_max)
        return kvm_fail(KVMIX_FULL, "the text is %d tokens, the buffer holds %d", e.n_tokens, n_max);
    return KVMIX_OK;
}

/* ---- decoding ---------------------------------------------------------------------------------------------- */

/* "<0xXX>" -> XX, anything else -> -1 */
static int32_t parse_byte_token(kvm_text text) {
    static const char digits[] = "0123456789ABCDEF";
    if (text.n_bytes != 6 || memcmp(text.data, "<0x", 3) != 0 || text.data[5] != '>') return -1;
    const char *high = memchr(digits, text.data[3], 16), *low = memchr(digits, text.data[4], 16);
    return high && low ? (int32_t)((high - digits) << 4 | (low - digits)) : -1;
}

typedef struct {
    char *data; /* [n_max] */
    int32_t n_max, n; /* n counts past n_max */
} byte_sink;

static void put(byte_sink *sink, const uint8_t *bytes, int32_t n) {
    for (int32_t i = 0; i < n; i++, sink->n++)
        if (sink->n < sink->n_max) sink->data[sink->n] = (char)bytes[i];
}

kvmix_status kvm_tokenizer_bytes(const kvm_tokenizer *tokenizer, int32_t token, char *buf, int32_t n_max,
                                 int32_t *n_bytes) {
    *n_bytes = 0;
    if (token < 0 || token >= tokenizer->n_vocab)
        return kvm_fail(KVMIX_ARG, "token %d is outside the vocabulary, 0 to %d", token, tokenizer->n_vocab - 1);
    if (n_max < 0 || (!buf && n_max))
        return kvm_fail(KVMIX_ARG, "buf is %s and n_max %d; give a buffer and its size", buf ? "set" : "NULL", n_max);

    kvm_text text = tokenizer->text[token];
    const uint8_t *p = (const uint8_t *)text.data, *end = p + text.n_bytes;
    byte_sink sink = {buf, n_max, 0};
    int32_t attr = tokenizer->attr[token];
    if (attr & KVMIX_TOKEN_BYTE) {
        put(&sink, &(uint8_t){(uint8_t)parse_byte_token(text)}, 1);
    } else if (attr & (KVMIX_TOKEN_CONTROL | KVMIX_TOKEN_UNKNOWN | KVMIX_TOKEN_USER)) {
        put(&sink, p, (int32_t)text.n_bytes);
    } else {
        for (character c; p != end; p += c.n_bytes) {
            c = character_at(p, end);
            int32_t byte = tokenizer->rule ? byte_of_alphabet(c.code_point) : c.code_point == 0x2581 ? ' ' : -1;
            if (byte >= 0) put(&sink, &(uint8_t){(uint8_t)byte}, 1);
            else put(&sink, p, c.n_bytes);
        }
    }
    *n_bytes = sink.n;
    if (sink.n > n_max)
        return kvm_fail(KVMIX_FULL, "token %d is %d bytes, the buffer holds %d", token, sink.n, n_max);
    return KVMIX_OK;
}

int32_t kvm_tokenizer_n_vocab(const kvm_tokenizer *tokenizer) { return tokenizer->n_vocab; }

kvm_specials kvm_tokenizer_specials(const kvm_tokenizer *tokenizer) { return tokenizer->specials; }

int32_t kvm_tokenizer_attr(const kvm_tokenizer *tokenizer, int32_t token) {
    return token >= 0 && token < tokenizer->n_vocab ? tokenizer->attr[token] : 0;
}

/* ---- opening ----------------------------------------------------------------------------------------------- */

static kvmix_status no_memory(const kvm_tokenizer *t) {
    return kvm_fail(KVMIX_NOMEM, "%.300s: no memory for a vocabulary of %d tokens", t->file_name, t->n_vocab);
}

/* tokenizer.ggml.model and .pre -> rule */
static kvmix_status read_kind(kvm_tokenizer *t, const kvm_gguf *file) {
    kvm_text model, pre = {"default", 7};
    bool found;
    KVM_TRY(kvm_gguf_get_text(file, "tokenizer.ggml.model", &model, &found));
    if (!found)
        return kvm_fail(KVMIX_FORMAT, "%.300s: tokenizer.ggml.model is missing; convert the model with its tokenizer",
                        t->file_name);
    if (same_text(model, "llama")) return KVMIX_OK;
    if (!same_text(model, "gpt2"))
        return kvm_fail(KVMIX_UNSUPPORTED, "%.300s: tokenizer.ggml.model is \"%.*s\"; this build has gpt2 and llama",
                        t->file_name, kvm_min((int32_t)model.n_bytes, 64), model.data);
    KVM_TRY(kvm_gguf_get_text(file, "tokenizer.ggml.pre", &pre, &found));
    for (int32_t i = 0; i < N_SPLIT_RULES; i++)
        if (same_text(pre, split_rules[i].name)) t->rule = &split_rules[i];
    if (t->rule) return KVMIX_OK;
    return kvm_fail(KVMIX_UNSUPPORTED, "%.300s: tokenizer.ggml.pre is \"%.*s\"; this build has default, gpt-2, "
                    "llama-bpe, qwen2 and smollm", t->file_name, kvm_min((int32_t)pre.n_bytes, 64), pre.data);
}

/* An array of the file; n 0: of any length. */
static kvmix_status read_array(const kvm_gguf *file, const char *key, kvm_gguf_type type, uint64_t n, bool required,
                               kvm_gguf_array *out, bool *found) {
    KVM_TRY(kvm_gguf_get_array(file, key, type, out, found));
    if (!*found && required)
        return kvm_fail(KVMIX_FORMAT, "%.300s: %s is missing; convert the model again", kvm_gguf_name(file), key);
    if (*found && n && out->n != n)
        return kvm_fail(KVMIX_FORMAT, "%.300s: %s has %llu elements but there are %llu tokens; convert the model again",
                        kvm_gguf_name(file), key, (unsigned long long)out->n, (unsigned long long)n);
    return KVMIX_OK;
}

static kvmix_status index_text(kvm_tokenizer *t) {
    uint64_t size = table_size((uint64_t)t->n_vocab);
    t->by_text = kvm_alloc_zero(size, sizeof *t->by_text);
    if (!t->by_text) return no_memory(t);
    t->text_mask = size - 1;
    for (int32_t id = 0; id < t->n_vocab; id++) {
        kvm_text text = t->text[id];
        if (text.n_bytes > t->longest_text) t->longest_text = text.n_bytes;
        if (text.n_bytes == 0) continue; /* a hole in the vocabulary: nothing becomes it */
        uint32_t hash;
        text_slot *slot = find_slot(t, text, (kvm_text){"", 0}, &hash);
        if (slot->id_plus_1)
            return kvm_fail(KVMIX_FORMAT, "%.300s: tokens %d and %d are both \"%.*s\"; convert the model again",
                            t->file_name, slot->id_plus_1 - 1, id, kvm_min((int32_t)text.n_bytes, 64), text.data);
        *slot = (text_slot){hash, id + 1};
    }
    return KVMIX_OK;
}

static kvmix_status read_tokens(kvm_tokenizer *t, const kvm_gguf *file) {
    kvm_gguf_array tokens;
    bool found;
    KVM_TRY(read_array(file, "tokenizer.ggml.tokens", KVM_GGUF_STRING, 0, true, &tokens, &found));
    if (tokens.n == 0 || tokens.n > MAX_VOCAB)
        return kvm_fail(KVMIX_FORMAT, "%.300s: tokenizer.ggml.tokens has %llu tokens, allowed are 1 to %d",
                        t->file_name, (unsigned long long)tokens.n, MAX_VOCAB);
    t->n_vocab = (int32_t)tokens.n;
    t->text = kvm_alloc(tokens.n, sizeof *t->text);
    t->attr = kvm_alloc_zero(tokens.n, sizeof *t->attr);
    if (!t->text || !t->attr) return no_memory(t);
    kvm_gguf_array_texts(&tokens, t->text);
    return index_text(t);
}

/* tokenizer.ggml.token_type -> attr; without it every token is a plain one */
static kvmix_status read_types(kvm_tokenizer *t, const kvm_gguf *file) {
    static const uint8_t attr_of_type[] = {0, 0, KVMIX_TOKEN_UNKNOWN, KVMIX_TOKEN_CONTROL, KVMIX_TOKEN_USER,
                                           KVMIX_TOKEN_UNUSED, KVMIX_TOKEN_BYTE};
    enum { N_TYPES = sizeof attr_of_type };
    kvm_gguf_array types;
    bool found;
    KVM_TRY(read_array(file, "tokenizer.ggml.token_type", KVM_GGUF_I32, (uint64_t)t->n_vocab, false, &types, &found));
    for (int32_t id = 0; found && id < t->n_vocab; id++) {
        int32_t type;
        memcpy(&type, &types.data[(size_t)id * sizeof type], sizeof type);
        if (type < 0 || type >= N_TYPES)
            return kvm_fail(KVMIX_FORMAT, "%.300s: token %d has type %d, allowed are 0 to %d; convert the model again",
                            t->file_name, id, type, N_TYPES - 1);
        t->attr[id] = attr_of_type[type];
        if (t->attr[id] == KVMIX_TOKEN_BYTE && parse_byte_token(t->text[id]) < 0) t->attr[id] = 0;
    }
    return KVMIX_OK;
}

/* tokenizer.ggml.scores -> priority */
static kvmix_status read_scores(kvm_tokenizer *t, const kvm_gguf *file) {
    kvm_gguf_array scores;
    bool found;
    KVM_TRY(read_array(file, "tokenizer.ggml.scores", KVM_GGUF_F32, (uint64_t)t->n_vocab, true, &scores, &found));
    t->priority = kvm_alloc((uint64_t)t->n_vocab, sizeof *t->priority);
    if (!t->priority) return no_memory(t);
    for (int32_t id = 0; id < t->n_vocab; id++) {
        float score;
        memcpy(&score, &scores.data[(size_t)id * sizeof score], sizeof score);
        if (!isfinite(score))
            return kvm_fail(KVMIX_FORMAT, "%.300s: the score of token %d is not finite; convert the model again",
                            t->file_name, id);
        uint32_t bits;
        score += 0.0f; /* -0 becomes +0 */
        memcpy(&bits, &score, sizeof bits);
        /* IEEE order: the larger of two positive floats has the larger bits, of two negative ones the smaller */
        t->priority[id] = bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
    }
    return KVMIX_OK;
}

/* A merge into a control token is left out (invariant 2); of equal ones the first counts. */
static kvmix_status add_merge(kvm_tokenizer *t, kvm_text merge, uint32_t rank) {
    const char *space = merge.n_bytes > 2 ? memchr(merge.data + 1, ' ', merge.n_bytes - 2) : NULL;
    int32_t left = -1, right = -1, result = -1;
    if (space) {
        kvm_text a = {merge.data, (size_t)(space - merge.data)};
        kvm_text b = {space + 1, merge.n_bytes - a.n_bytes - 1};
        left = find_text(t, a.data, a.n_bytes);
        right = find_text(t, b.data, b.n_bytes);
        result = find_joined(t, a, b);
    }
    if (left < 0 || right < 0 || result < 0)
        return kvm_fail(KVMIX_FORMAT, "%.300s: merge %u, \"%.*s\", does not join two tokens into a third; convert the "
                        "model again", t->file_name, rank, kvm_min((int32_t)merge.n_bytes, 64), merge.data);
    merge_slot *slot = find_merge(t, left, right);
    if (slot->pair_plus_1 || (t->attr[result] & RESERVED)) return KVMIX_OK;
    *slot = (merge_slot){pair_of(left, right) + 1, rank, result};
    return KVMIX_OK;
}

/* tokenizer.ggml.merges, "left right" in the order of their rank */
static kvmix_status read_merges(kvm_tokenizer *t, const kvm_gguf *file) {
    kvm_gguf_array merges;
    bool found;
    KVM_TRY(read_array(file, "tokenizer.ggml.merges", KVM_GGUF_STRING, 0, true, &merges, &found));
    uint64_t size = table_size(merges.n);
    t->merges = kvm_alloc_zero(size, sizeof *t->merges);
    kvm_text *texts = kvm_alloc(merges.n, sizeof *texts);
    if (!t->merges || !texts) {
        free(texts);
        return no_memory(t);
    }
    t->merge_mask = size - 1;
    kvm_gguf_array_texts(&merges, texts);
    kvmix_status status = KVMIX_OK;
    for (uint64_t i = 0; i < merges.n && status == KVMIX_OK; i++) status = add_merge(t, texts[i], (uint32_t)i);
    free(texts);
    return status;
}

/* Tokens that end a turn, by text, as llama.cpp knows them. Some files call them plain tokens: they are control
 * tokens all the same. `tag` marks spellings that vocabularies also have as ordinary text (an HTML tag): those end a
 * turn only where the file itself calls them control. */
static const struct {
    const char *text;
    bool tag;
} end_names[] = {
    {"<|im_end|>", false}, {"<|eot_id|>", false}, {"<|eom_id|>", false}, {"<|end|>", false},
    {"<end_of_turn>", false}, {"<|endoftext|>", false}, {"<|end_of_text|>", false}, {"<end_of_utterance>", false},
    {"<|return|>", false}, {"<|call|>", false}, {"<|fim_pad|>", false}, {"<|repo_name|>", false},
    {"<|file_sep|>", false}, {"<\xef\xbd\x9c" "end" SPACE_MARK "of" SPACE_MARK "sentence\xef\xbd\x9c>", false},
    {"</s>", true}, {"<eos>", true}, {"<EOT>", true}, {"[EOS]", true}, {"[EOT]", true},
};

static kvmix_status read_id(kvm_tokenizer *t, const kvm_gguf *file, const char *key, int32_t *id) {
    int64_t value;
    bool found;
    KVM_TRY(kvm_gguf_get_int(file, key, 0, t->n_vocab - 1, &value, &found));
    if (found) *id = (int32_t)value;
    return KVMIX_OK;
}

static kvmix_status read_specials(kvm_tokenizer *t, const kvm_gguf *file) {
    bool found, llama = t->rule == NULL;
    kvm_specials s = {-1, -1, -1, -1, -1, llama || t->rule->add_bos, false};
    if (llama && t->n_vocab > 2) s.bos = 1, s.eos = 2, s.unk = 0; /* SentencePiece's own */
    KVM_TRY(read_id(t, file, "tokenizer.ggml.bos_token_id", &s.bos));
    KVM_TRY(read_id(t, file, "tokenizer.ggml.eos_token_id", &s.eos));
    KVM_TRY(read_id(t, file, "tokenizer.ggml.eot_token_id", &s.eot));
    KVM_TRY(read_id(t, file, "tokenizer.ggml.eom_token_id", &s.eom));
    KVM_TRY(read_id(t, file, "tokenizer.ggml.unknown_token_id", &s.unk));
    KVM_TRY(kvm_gguf_get_bool(file, "tokenizer.ggml.add_bos_token", &s.add_bos, &found));
    KVM_TRY(kvm_gguf_get_bool(file, "tokenizer.ggml.add_eos_token", &s.add_eos, &found));
    t->add_space_prefix = llama;
    KVM_TRY(kvm_gguf_get_bool(file, "tokenizer.ggml.add_space_prefix", &t->add_space_prefix, &found));
    if ((s.add_bos && s.bos < 0) || (s.add_eos && s.eos < 0))
        return kvm_fail(KVMIX_FORMAT, "%.300s: every text is to get a token that the file does not name: "
                        "tokenizer.ggml.%s_token_id is missing; convert the model again", t->file_name,
                        s.add_bos && s.bos < 0 ? "bos" : "eos");
    t->specials = s;

    const int32_t ends[] = {s.eos, s.eot, s.eom};
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++)
        if (ends[i] >= 0) t->attr[ends[i]] |= KVMIX_TOKEN_END;
    for (size_t i = 0; i < sizeof end_names / sizeof end_names[0]; i++) {
        int32_t id = find_text(t, end_names[i].text, strlen(end_names[i].text));
        if (id < 0 || (end_names[i].tag && !(t->attr[id] & KVMIX_TOKEN_CONTROL))) continue;
        t->attr[id] = (uint8_t)((t->attr[id] & ~KVMIX_TOKEN_USER) | KVMIX_TOKEN_CONTROL | KVMIX_TOKEN_END);
    }
    return KVMIX_OK;
}

static int compare_specials(const void *a, const void *b) {
    const kvm_text *x = &((const special_token *)a)->text, *y = &((const special_token *)b)->text;
    int order = memcmp(x->data, y->data, x->n_bytes < y->n_bytes ? x->n_bytes : y->n_bytes);
    return order ? order : (x->n_bytes > y->n_bytes) - (x->n_bytes < y->n_bytes);
}

static kvmix_status index_specials(kvm_tokenizer *t) {
    const int32_t kinds = KVMIX_TOKEN_CONTROL | KVMIX_TOKEN_UNKNOWN | KVMIX_TOKEN_USER;
    for (int32_t id = 0; id < t->n_vocab; id++) t->n_special += (t->attr[id] & kinds) && t->text[id].n_bytes;
    t->special = kvm_alloc((uint64_t)t->n_special, sizeof *t->special);
    if (!t->special) return no_memory(t);
    special_token *next = t->special;
    for (int32_t id = 0; id < t->n_vocab; id++)
        if ((t->attr[id] & kinds) && t->text[id].n_bytes) *next++ = (special_token){t->text[id], id};
    qsort(t->special, (size_t)t->n_special, sizeof *t->special, compare_specials);
    for (int32_t byte = 0; byte <= 256; byte++)
        t->special_first[byte] = first_at_least(t->special, 0, t->n_special, 0, byte);
    return KVMIX_OK;
}

/* gpt2: the token of each letter of the alphabet. llama: <0xXX>, else the byte itself as a token, else unknown. */
static void index_bytes(kvm_tokenizer *t) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        char spelling[8];
        if (t->rule) {
            t->byte_token[byte] = find_plain(t, spelling, spell_byte(byte, spelling));
            continue;
        }
        snprintf(spelling, sizeof spelling, "<0x%02X>", byte);
        int32_t id = find_text(t, spelling, 6);
        if (id < 0 || !(t->attr[id] & KVMIX_TOKEN_BYTE)) id = find_plain(t, &(char){(char)byte}, 1);
        if (id < 0 && t->specials.unk >= 0 && !(t->attr[t->specials.unk] & (KVMIX_TOKEN_CONTROL | KVMIX_TOKEN_END))) {
            id = t->specials.unk; /* one that a text may hold: never a control token */
        }
        t->byte_token[byte] = id;
    }
}

static kvmix_status open_parts(kvm_tokenizer *t, const kvm_gguf *file) {
    KVM_TRY(read_kind(t, file));
    KVM_TRY(read_tokens(t, file));
    KVM_TRY(read_types(t, file));
    KVM_TRY(read_specials(t, file)); /* completes attr, which the merges look at */
    KVM_TRY(t->rule ? read_merges(t, file) : read_scores(t, file));
    KVM_TRY(index_specials(t));
    index_bytes(t);
    return KVMIX_OK;
}

kvmix_status kvm_tokenizer_open(kvm_tokenizer **out, const kvm_gguf *file) {
    *out = NULL;
    kvm_tokenizer *t = kvm_alloc_zero(1, sizeof *t);
    if (!t) return kvm_fail(KVMIX_NOMEM, "%.300s: no memory for a tokenizer", kvm_gguf_name(file));
    t->file_name = kvm_gguf_name(file);
    t->seed = (uint64_t)(uintptr_t)t;
    kvmix_status status = open_parts(t, file);
    if (status == KVMIX_OK) *out = t;
    else kvm_tokenizer_close(t);
    return status;
}

void kvm_tokenizer_close(kvm_tokenizer *tokenizer) {
    if (!tokenizer) return;
    free(tokenizer->text);
    free(tokenizer->attr);
    free(tokenizer->priority);
    free(tokenizer->by_text);
    free(tokenizer->merges);
    free(tokenizer->special);
    free(tokenizer);
}
