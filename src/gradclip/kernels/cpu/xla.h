/* Handlers for XLA's foreign function interface; `jax/xla.py` registers them. */
#ifndef GRADCLIP_XLA_H
#define GRADCLIP_XLA_H

/* The oldest version of the interface that has what is used. */
enum { XLA_MAJOR = 0, XLA_MINOR = 1 };

/* A total in a graph: words of value, as in WIDE_UNIT, then the counts of Inf and of NaN. */
enum { XLA_WORDS = 146 };
/* A norm in a graph: significand, exponent, if it is inf, if it is NaN. */
enum { XLA_NUMBER = 4 };
/* What is to be done: one of these, and the factor's significand and exponent. */
enum { XLA_DECISION = 3, XLA_KEEP = 0, XLA_SCALE = 1, XLA_NAN = 2, XLA_ZERO = 3 };

typedef struct {
    const char *name;
    void *(*handler)(void *frame);
} xla_handler_t;

/* Ends with a NULL name. */
extern const xla_handler_t XLA_HANDLERS[];

#endif
