extern "C" __attribute__((visibility("default"))) int qfunc_isa_avx512() { return 0; }
