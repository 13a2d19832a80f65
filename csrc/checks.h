// Argument errors, which module.cpp turns into Python exceptions: `name: expected X, got Y`.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fastft {

// Becomes ValueError.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// For checks that must not put a message together unless they fail.
template <typename... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  throw ArgumentError(text(parts...));
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace fastft
