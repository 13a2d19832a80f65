// Argument errors: what was wrong, what was expected, what came. They become Python exceptions in module.cpp.
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

// For checks whose texts are not to be put together when all is well.
template <typename... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  throw ArgumentError(text(parts...));
}

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace fastft
