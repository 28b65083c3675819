#!/bin/sh
# Builds check/standalone without XLA: build.sh OUT [COMPILER [FLAGS...]]. The architecture is that of the compiler.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
compiler=${2:-g++}
[ $# -le 1 ] || shift
[ $# -le 0 ] || shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
common="-std=gnu++17 -O3 -fwrapv -ffp-contract=fast -fno-math-errno -Wno-psabi -pthread"
unit() { # source, flags of its instruction set
  source=$1
  shift
  "$compiler" $common "$@" -c "$here/$source" -o "$work/$(basename "$source").o"
}
for source in ../src/matmul.cc ../src/select.cc ../src/isa_generic.cc standalone.cc; do unit "$source" "$@"; done
case $("$compiler" -dumpmachine) in
x86_64*)
  unit ../src/isa_avx2.cc -mavx2 -mfma -mf16c "$@"
  avx512="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c -mprefer-vector-width=512"
  for source in isa_avx512 isa_avx512_stream isa_avx512_stream_int isa_avx512_tile isa_avx512_tile_int; do unit ../src/$source.cc $avx512 "$@"; done
  unit ../src/isa_avx512_tile_half.cc $avx512 -mavx512bf16 -mavx512vbmi "$@" ;;
aarch64*)
  unit ../src/isa_neon.cc -march=armv8.2-a+dotprod "$@"
  unit ../src/isa_neon_i8mm.cc -march=armv8.2-a+dotprod+i8mm "$@" ;;
esac
"$compiler" $common "$@" "$work"/*.o -o "$out"
