// The parts of the AVX-512 kernels, compiled apart.
#pragma once
#include "problem.h"

namespace qfunc::avx512 {

void float_stream(const Product& p, int64_t n0, int64_t n1);
void float_tile(const Product& p, int64_t n0, int64_t n1);
void int_stream(const Product& p, int64_t n0, int64_t n1);
void int_tile(const Product& p, int64_t n0, int64_t n1);
bool int_stream_ok(const Product& p);
void half_tile(const Product& p, int64_t n0, int64_t n1);  // needs BF16 and VBMI besides
double half_peak(int64_t rounds);

}  // namespace qfunc::avx512
