// Python bindings of the replay, kept apart from the pager's: arrays in, counters out.
#pragma once

#include <pybind11/pybind11.h>

#include "paging/event_log.h"

namespace moe_offload {

// A log as a dictionary of NumPy arrays, named as the fields of EventLog.
pybind11::dict events_dict(const EventLog& log);

void bind_replay(pybind11::module_& m);

}  // namespace moe_offload
