extern "C" __attribute__((visibility("default"))) int qfunc_select() { return 0; }
