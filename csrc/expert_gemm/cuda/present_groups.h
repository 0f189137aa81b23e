// The groups of a launch with their pages looked up, for the tile walker: an absent expert's group
// has page -1 and no tiles.
#pragma once

#include "expert_gemm/cuda/params.h"

namespace moe_offload::cuda {

constexpr uint32_t kNoRow = 0xffffffffu;  // of an offset, in units of 16 bytes: no such row

struct PresentGroups {
    const ExpertParams& p;
    TILE_FUNCTION Group group(int index) const {
        Group group = p.group(index);
        group.page = p.pages.page_of(group);
        return group;
    }
};

}  // namespace moe_offload::cuda
