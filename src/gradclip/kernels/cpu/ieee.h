/* Whatever a host has set for floats, here they round to nearest and keep subnormals. */
#ifndef GRADCLIP_IEEE_H
#define GRADCLIP_IEEE_H

#include <fenv.h>

/* On this thread, until fesetenv(saved). */
static inline void set_ieee(fenv_t *saved) {
    fegetenv(saved);
    fesetenv(FE_DFL_ENV);
}

#endif
