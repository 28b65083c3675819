extern "C" __attribute__((visibility("default"))) int qfunc_isa_avx2() { return 0; }
