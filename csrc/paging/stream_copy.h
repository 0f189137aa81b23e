// A copy that leaves the caches to others.
//
// What arrives in a bounce buffer is copied to a slot once and read much later, if at all before
// other data has displaced it. Ordinary stores would first read each line of the slot and then keep
// it in the cache, at the expense of the bounce buffer, which the disk fills again and again and
// which is filled fastest while it is cached. Streaming stores do neither.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace moe_offload {

// As memcpy; the bytes are visible to whoever synchronises with this thread afterwards.
inline void stream_copy(std::byte* to, const std::byte* from, size_t nbytes) {
#ifdef __SSE2__
    constexpr size_t kVector = 16, kLine = 64;
    if (nbytes >= 4096) {
        const size_t head = -reinterpret_cast<uintptr_t>(to) % kLine;
        std::memcpy(to, from, head);
        to += head;
        from += head;
        nbytes -= head;
        for (; nbytes >= kLine; to += kLine, from += kLine, nbytes -= kLine) {
            __m128i line[kLine / kVector];
            for (size_t i = 0; i < kLine / kVector; ++i)
                line[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i);
            for (size_t i = 0; i < kLine / kVector; ++i)
                _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, line[i]);
        }
        _mm_sfence();  // streaming stores are ordered by nothing else
    }
#endif
    std::memcpy(to, from, nbytes);
}

}  // namespace moe_offload
