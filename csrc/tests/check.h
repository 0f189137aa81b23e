// The whole test kit of the C++ tests: macros that print what failed and abort, and a line per
// test.
//
// A failed check ends the program, because a pager that broke an invariant has nothing more to say
// and its threads may not join. A test is a function without arguments:
//
//     void evicts_the_oldest_page() { CHECK_EQ(table.victim(), 3); }
//     int main() { RUN(evicts_the_oldest_page); }
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

namespace check {

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, what.c_str());
    std::abort();
}

template <typename T>
std::string show(const T& value) {
    if constexpr (requires(std::ostringstream& out) { out << value; }) {
        std::ostringstream out;
        out << value;
        return out.str();
    } else if constexpr (requires { value.begin(); }) {
        std::string text = "[";
        for (const auto& item : value) text += (text.size() > 1 ? ", " : "") + show(item);
        return text + "]";
    } else {
        return "?";
    }
}

template <typename F>
void run(const char* name, F&& test) {
    std::printf("%-60s ", name);
    std::fflush(stdout);  // so that a hang or an abort names its test
    const auto start = std::chrono::steady_clock::now();
    test();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("ok %7.3f s\n", seconds.count());
}

}  // namespace check

#define RUN(test) ::check::run(#test, test)

#define CHECK(condition)                                                 \
    do {                                                                 \
        if (!(condition)) ::check::fail(__FILE__, __LINE__, #condition); \
    } while (0)

#define CHECK_EQ(got, want)                                                                    \
    do {                                                                                       \
        const auto check_got = (got);                                                          \
        const auto check_want = (want);                                                        \
        if (!(check_got == check_want))                                                        \
            ::check::fail(__FILE__, __LINE__,                                                  \
                          std::string(#got " == " #want ", got ") + ::check::show(check_got) + \
                              ", expected " + ::check::show(check_want));                      \
    } while (0)

// The statement must throw `Type` with `text` somewhere in its message ("" accepts any message).
#define CHECK_THROWS(Type, text, ...)                                                       \
    do {                                                                                    \
        bool check_threw = false;                                                           \
        try {                                                                               \
            __VA_ARGS__;                                                                    \
        } catch (const Type& error) {                                                       \
            check_threw = true;                                                             \
            if (std::string(error.what()).find(text) == std::string::npos)                  \
                ::check::fail(                                                              \
                    __FILE__, __LINE__,                                                     \
                    std::string("message with \"") + (text) + "\", got: " + error.what());  \
        }                                                                                   \
        if (!check_threw) ::check::fail(__FILE__, __LINE__, #__VA_ARGS__ " throws " #Type); \
    } while (0)
