// Exceptions of the paging core. The bindings turn each into the Python class of the same name
// (moe_offload/errors.py); worker threads carry them as std::exception_ptr to whoever waits.
#pragma once

#include <stdexcept>
#include <string>

namespace moe_offload {

// A page could not be read: names layer, expert, file and offset.
class PageReadError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The call does not fit the present state: use after close, use in a forked child, timeout.
class StateError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The compute device or its driver refused: missing, too old, out of memory, or a failed call.
class DeviceError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

}  // namespace moe_offload
