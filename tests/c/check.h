/* check.h - what a C test program needs: CHECK counts and names what failed, check_report ends main.
 *
 * A failed check does not stop the program, so that one run shows all of them.
 */
#ifndef KVM_CHECK_H
#define KVM_CHECK_H

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "kvmix.h"

static int check_passed, check_failed;

static inline bool check_note(bool ok, const char *file, int line, const char *what) {
    if (ok) {
        check_passed++;
    } else {
        check_failed++;
        fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    }
    return ok;
}

#define CHECK(condition) check_note((condition), __FILE__, __LINE__, #condition)

/* The call gives this status; otherwise its sentence is shown. */
static inline bool check_status(int32_t want, int32_t got, const char *file, int line, const char *what) {
    if (!check_note(want == got, file, line, what))
        fprintf(stderr, "    wanted %s, got %s: %s\n", kvmix_status_name(want), kvmix_status_name(got),
                got == KVMIX_OK ? "" : kvmix_last_error());
    return want == got;
}

#define CHECK_STATUS(want, call) check_status((want), (call), __FILE__, __LINE__, #call)

/* The sentence of the last failure holds this text. */
static inline bool check_says(const char *text, const char *file, int line) {
    bool ok = strstr(kvmix_last_error(), text) != NULL;
    if (!check_note(ok, file, line, text)) fprintf(stderr, "    is not in: %s\n", kvmix_last_error());
    return ok;
}

#define CHECK_SAYS(text) check_says((text), __FILE__, __LINE__)

/* The exit status of the program. */
static inline int check_report(void) {
    if (check_failed == 0) printf("%d checks passed\n", check_passed);
    else printf("%d of %d checks failed\n", check_failed, check_failed + check_passed);
    return check_failed != 0;
}

#endif
