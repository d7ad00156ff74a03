/* unicode_tables.h - the classes of code points by which pre-tokenizers split text.
 *
 * kvm_unicode_ranges[kvm_unicode_n_ranges] is sorted; an entry is first_code_point << 3 | class and holds up to the
 * next entry. Entry 0 begins at U+0000, the last one reaches U+10FFFF.
 */
#ifndef KVM_UNICODE_TABLES_H
#define KVM_UNICODE_TABLES_H

#include <stdint.h>

typedef enum { /* as in tests/make_unicode_tables.py */
    KVM_UNICODE_OTHER, /* marks, symbols, controls, unassigned */
    KVM_UNICODE_LETTER, /* \p{L} */
    KVM_UNICODE_NUMBER, /* \p{N} */
    KVM_UNICODE_PUNCTUATION, /* \p{P} */
    KVM_UNICODE_SPACE /* White_Space */
} kvm_unicode_class;

extern const int32_t kvm_unicode_n_ranges;
extern const uint32_t kvm_unicode_ranges[];

#endif
