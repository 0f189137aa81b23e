// A directory that is gone again at the end of the test, and files of random bytes in it.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

struct TemporaryDirectory {
    std::filesystem::path path;
    TemporaryDirectory() {
        std::string name = (std::filesystem::temp_directory_path() / "moe_offload_XXXXXX").string();
        if (::mkdtemp(name.data()) == nullptr) std::abort();
        path = name;
    }
    ~TemporaryDirectory() { std::filesystem::remove_all(path); }
};

inline std::vector<char> random_bytes(size_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<char> bytes(count);
    for (char& byte : bytes) byte = static_cast<char>(random());
    return bytes;
}

inline void write_file(const std::filesystem::path& path, const std::vector<char>& bytes) {
    std::ofstream(path, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
}
