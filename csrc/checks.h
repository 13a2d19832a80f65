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

template <typename... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw ArgumentError(text(parts...));
}

}  // namespace fastft
