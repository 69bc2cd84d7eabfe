// Where in the sources something happened.

#include <dlfcn.h>
#include <execinfo.h>
#include <stdio.h>
#include <string.h>

#include <sstream>

#include "cuda/emulator/runtime.h"

namespace gemma2::emulator {
namespace {

struct Line {
  std::string file, number;
};

// The lines of return addresses, those of an address from the innermost inlined function outwards,
// by binutils' addr2line: asked once, since it reads all of the debugging information first.
// Addresses outside this library have none.
std::vector<Line> lines_of(void* const* addresses, int n) {
  Dl_info mine, info;
  if (dladdr(reinterpret_cast<void*>(&rt), &mine) == 0) return {};
  std::ostringstream command;
  command << "addr2line -i -e '" << mine.dli_fname << "'" << std::hex;
  for (int i = 0; i < n; ++i) {
    if (dladdr(addresses[i], &info) == 0 || info.dli_fbase != mine.dli_fbase) continue;
    // in the call itself
    command << " 0x" << static_cast<char*>(addresses[i]) - static_cast<char*>(info.dli_fbase) - 1;
  }
  command << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (pipe == nullptr) return {};
  std::vector<Line> lines;
  char buffer[4096];
  while (fgets(buffer, sizeof buffer, pipe) != nullptr) {
    std::string text = buffer;
    text = text.substr(0, text.find_first_of(" \n"));  // without "(discriminator 3)"
    const size_t colon = text.rfind(':');
    if (colon != std::string::npos)
      lines.push_back({text.substr(0, colon), text.substr(colon + 1)});
  }
  pclose(pipe);
  return lines;
}

bool ends_with(const std::string& text, const char* end) {
  const size_t n = strlen(end);
  return text.size() >= n && text.compare(text.size() - n, n, end) == 0;
}

// From the source tree on.
std::string shortened(const std::string& file) {
  for (const char* root : {"/csrc/", "/tests/"}) {
    const size_t at = file.rfind(root);
    if (at != std::string::npos) return file.substr(at + 1);
  }
  return file;
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// The emulator itself, what stands in for the device, and libraries: no place to look for a fault.
bool is_kernel_code(const std::string& file) {
  if (ends_with(file, ".cu")) return true;
  return contains(file, "/csrc/") && !contains(file, "/csrc/cuda/ptx.h") &&
         !contains(file, "/csrc/cuda/launch.h");
}

// The innermost line of the kernels' code, and the line of the kernel file that called it.
std::string find_line(void* site) {
  void* stack[64];
  int depth = 1;
  if (site != nullptr)
    stack[0] = site;
  else
    depth = backtrace(stack, 64);
  std::string text;
  for (const Line& line : lines_of(stack, depth)) {
    if (!is_kernel_code(line.file)) continue;
    const std::string place = shortened(line.file) + ":" + line.number;
    const bool in_kernel_file = ends_with(line.file, ".cu");
    if (text.empty())
      text = place;
    else if (in_kernel_file)
      text += " (called at " + place + ")";
    if (in_kernel_file) return text;
  }
  return text.empty() ? "unknown line (is binutils' addr2line installed?)" : text;
}

}  // namespace

std::string line_of(void* site) {
  static std::unordered_map<void*, std::string> known;  // threads of a deadlock wait at one place
  if (site == nullptr) return find_line(site);
  const auto found = known.find(site);
  return found != known.end() ? found->second : known[site] = find_line(site);
}

}  // namespace gemma2::emulator
