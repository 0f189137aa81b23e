// Host memory for the device's copy engine: alignment, registration in parts, limits.
#include <cstring>

#include "check.h"
#include "fake_cuda/fake_cuda.h"
#include "paging/pinned_memory.h"

using namespace moe_offload;

namespace {

std::shared_ptr<CudaContext> context() {
    fake_cuda_reset();
    return std::make_shared<CudaContext>(CudaDriver::load(FAKE_CUDA), 0);
}

constexpr size_t kPage = PinnedRanges::kPageBytes;

void memory_is_aligned_zeroed_and_writable_to_its_end() {
    for (const size_t nbytes : {size_t{1}, size_t{4096}, (size_t{2} << 20) + 5}) {
        HostMemory memory(nbytes);
        CHECK_EQ(reinterpret_cast<uintptr_t>(memory.data()) % kHugePage, 0u);
        memory.populate(0, nbytes);
        CHECK(memory.data()[nbytes - 1] == std::byte{0});
        std::memset(memory.data(), 9, nbytes);
        memory.populate(0, nbytes);  // changes nothing
        CHECK(memory.data()[nbytes / 2] == std::byte{9});
    }
    CHECK(HostMemory(0).data() == nullptr);
}

void ranges_grow_to_pages_and_never_register_a_page_twice() {
    const auto where = context();
    HostMemory memory(16 * kPage);
    {
        PinnedRanges pins(where, SIZE_MAX);
        CHECK(pins.pin(memory.data() + 100, 200));
        CHECK_EQ(pins.pinned_bytes(), kPage);
        CHECK(pins.pin(memory.data() + 10, 3 * kPage));  // its first page is there already
        CHECK_EQ(pins.pinned_bytes(), 4 * kPage);
        CHECK(pins.pin(memory.data() + 8 * kPage, kPage));
        CHECK(pins.pin(memory.data() + 3 * kPage, 8 * kPage));  // fills the gap, and goes on
        CHECK_EQ(pins.pinned_bytes(), 11 * kPage);
        CHECK_EQ(size_t(fake_cuda_counts().registered_bytes), 11 * kPage);
        CHECK(pins.limit().empty());
    }
    CHECK_EQ(fake_cuda_counts().registrations, 0);
}

void reach_ends_where_a_registration_does() {
    const auto where = context();
    HostMemory memory(16 * kPage);
    PinnedRanges pins(where, SIZE_MAX);
    CHECK(pins.pin(memory.data() + 2 * kPage, 2 * kPage));
    CHECK(pins.pin(memory.data() + 4 * kPage, 2 * kPage));
    const auto reach = [&](size_t at, size_t nbytes) {
        const auto found = pins.reach(memory.data() + at, nbytes);
        return std::pair(found.nbytes, found.pinned);
    };
    CHECK(reach(0, 10 * kPage) == std::pair(2 * kPage, false));
    CHECK(reach(2 * kPage, 10 * kPage) == std::pair(2 * kPage, true));  // not into the next
    CHECK(reach(4 * kPage + 1, 100) == std::pair(size_t{100}, true));
    CHECK(reach(5 * kPage, 10 * kPage) == std::pair(kPage, true));
    CHECK(reach(6 * kPage, 10 * kPage) == std::pair(10 * kPage, false));
}

void the_systems_limit_ends_pinning_and_is_explained() {
    const auto where = context();
    HostMemory memory(16 * kPage);
    fake_cuda_set_register_limit(3 * kPage);
    PinnedRanges pins(where, SIZE_MAX);
    CHECK(pins.pin(memory.data(), 2 * kPage));
    CHECK(!pins.pin(memory.data() + 8 * kPage, 2 * kPage));
    CHECK(pins.limit().find("refused to pin more than 8192 bytes (error 2)") != std::string::npos);
    CHECK(!pins.pin(memory.data() + 12 * kPage, kPage));  // once is enough
    CHECK_EQ(pins.pinned_bytes(), 2 * kPage);
}

void the_budget_ends_pinning_and_is_explained() {
    const auto where = context();
    HostMemory memory(16 * kPage);
    PinnedRanges pins(where, 3 * kPage);
    CHECK(pins.pin(memory.data(), 3 * kPage));
    CHECK(!pins.pin(memory.data() + 8 * kPage, kPage));
    CHECK(pins.limit().find("budget of 12288 bytes") != std::string::npos);
}

void memory_registered_by_somebody_else_is_left_alone() {
    const auto where = context();
    HostMemory memory(4 * kPage);
    PinnedRanges theirs(where, SIZE_MAX), ours(where, SIZE_MAX);
    CHECK(theirs.pin(memory.data() + kPage, kPage));
    CHECK(!ours.pin(memory.data(), 4 * kPage));
    CHECK(!ours.reach(memory.data(), 4 * kPage).pinned);
}

}  // namespace

int main() {
    RUN(memory_is_aligned_zeroed_and_writable_to_its_end);
    RUN(ranges_grow_to_pages_and_never_register_a_page_twice);
    RUN(reach_ends_where_a_registration_does);
    RUN(the_systems_limit_ends_pinning_and_is_explained);
    RUN(the_budget_ends_pinning_and_is_explained);
    RUN(memory_registered_by_somebody_else_is_left_alone);
}
