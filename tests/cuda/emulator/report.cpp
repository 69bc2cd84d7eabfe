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

// The lines of a return address, innermost inlined function first, by binutils' addr2line.
std::vector<Line> lines_of(void* address) {
  Dl_info info;
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return {};
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) -
                           reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;  // in the call itself
  std::ostringstream command;
  command << "addr2line -i -e '" << info.dli_fname << "' 0x" << std::hex << offset
          << " 2>/dev/null";
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

// The first line of a kernel file, that is the place the author of a kernel looks for.
std::string find_line(void* site) {
  void* stack[64];
  int depth = 1;
  if (site != nullptr)
    stack[0] = site;
  else
    depth = backtrace(stack, 64);
  for (int i = 0; i < depth; ++i)
    for (const Line& line : lines_of(stack[i]))
      if (ends_with(line.file, ".cu")) return shortened(line.file) + ":" + line.number;
  return "unknown line (is binutils' addr2line installed?)";
}

}  // namespace

std::string line_of(void* site) {
  static std::unordered_map<void*, std::string> known;  // threads of a deadlock wait at one place
  if (site == nullptr) return find_line(site);
  const auto found = known.find(site);
  return found != known.end() ? found->second : known[site] = find_line(site);
}

}  // namespace gemma2::emulator
