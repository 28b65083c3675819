extern "C" __attribute__((visibility("default"))) int qfunc_ffi() { return 0; }
