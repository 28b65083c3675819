extern "C" __attribute__((visibility("default"))) int qfunc_isa_generic() { return 0; }
