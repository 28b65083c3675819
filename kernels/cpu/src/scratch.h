// Buffers that a thread keeps between calls: fresh pages for every call would cost more than a small matmul.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace qfunc {
namespace {  // of every unit its own: one for all would be whichever the linker met first, compiled for any instruction set

constexpr size_t kKept = size_t{64} << 20;  // a larger buffer is given back when a much smaller one will do

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  // At least `bytes` bytes, aligned to a cache line, contents undefined; valid until the next call on this object.
  void* get(size_t bytes) {
    bytes = (bytes + 64 + 4095) / 4096 * 4096;
    if (bytes > size_ || (size_ > kKept && bytes * 8 < size_)) {
      std::free(data_);
      data_ = std::aligned_alloc(64, bytes);
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  template <class T>
  T* get(size_t count) { return static_cast<T*>(get(count * sizeof(T))); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace
}  // namespace qfunc
