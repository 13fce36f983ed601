/* Whatever a host has set for floats, what is computed here rounds to nearest and keeps subnormals. */
#ifndef GRADCLIP_IEEE_H
#define GRADCLIP_IEEE_H

#include <fenv.h>

/* On this thread, until fesetenv(saved). */
static inline void set_ieee(fenv_t *saved) {
    fegetenv(saved);
    fesetenv(FE_DFL_ENV);
}

#endif
