// Cuts all entries into chunks, so that one parallel loop serves many small tensors as well as few large ones.
#include "adamw.h"

#include <algorithm>

#include "adamw_kernels.h"
#include "instruction_set.h"
#include "parallel.h"

namespace fastft::cpu {
namespace {

constexpr int64_t kChunk = 32768;  // elements; below this a step is not worth a second thread

struct Chunk {
  int64_t entry, begin, end, unit;  // unit: the first, of an entry with low bits
};

constexpr int64_t kUnits = kChunk / kUnit;

// Where the chunk that begins at `begin` ends: with a unit, or short of a block of 8-bit moments that it would cut.
int64_t end_of_chunk(const AdamWEntry& e, int64_t begin, int64_t unit) {
  if (e.low_width != 0) return e.unit_begin(unit + kUnits);
  const int64_t n = e.live_numel(), end = begin + kChunk;
  if (end >= n) return n;
  return e.state_dtype == DType::u8 ? end - end % e.block_row % kBlock8 : end;
}

std::vector<Chunk> chunks_of(const std::vector<AdamWEntry>& entries) {
  std::vector<Chunk> chunks;
  chunks.reserve(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    const AdamWEntry& e = entries[i];
    int64_t unit = 0;
    for (int64_t begin = 0, n = e.live_numel(); begin < n; unit += kUnits) {
      const int64_t end = end_of_chunk(e, begin, unit);
      chunks.push_back({static_cast<int64_t>(i), begin, end, unit});
      begin = end;
    }
  }
  return chunks;
}

// work(first chunk, last chunk) over all of them; serial while they hold less than one chunk's worth of elements.
template <typename Work>
void for_each_chunk(const std::vector<Chunk>& chunks, const Work& work) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  int64_t elements = 0;
  for (const Chunk& c : chunks) elements += c.end - c.begin;
  const int64_t average = std::max<int64_t>(1, elements / std::max<int64_t>(1, count));
  parallel_for(count, kChunk / average, work);
}

bool is_selective(const AdamWEntry& e) {
  return form_of(e.anchoring) == AnchorForm::selective;
}

const AdamWKernels& kernels() {
#if defined(__x86_64__)
  if (best_set() == InstructionSet::v4) return adamw_v4;
  if (best_set() == InstructionSet::v3) return adamw_v3;
#endif
  return adamw_baseline;
}

// Moves those selectively anchored tensors to their anchor whose sums, one of each chunk, ask for it.
void project(const std::vector<AdamWEntry>& entries, const std::vector<AdamWGroup>& groups,
             const std::vector<Chunk>& chunks, const std::vector<SelectiveSums>& sums) {
  std::vector<SelectiveSums> totals(entries.size());
  for (size_t i = 0; i < chunks.size(); ++i) {  // in the order of the chunks, whoever summed them
    SelectiveSums& total = totals[chunks[i].entry];
    total.uphill += sums[i].uphill;
    total.before += sums[i].before;
    total.after += sums[i].after;
  }
  std::vector<double> pulls(entries.size());
  for (size_t i = 0; i < entries.size(); ++i)
    if (is_selective(entries[i])) pulls[i] = selective_pull(totals[i], groups[entries[i].group].options);
  std::vector<Chunk> moved;
  for (const Chunk& c : chunks)
    if (pulls[c.entry] > 0.0) moved.push_back(c);
  const AdamWKernels& k = kernels();
  for_each_chunk(moved, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      k.project(entries[moved[i].entry], moved[i].begin, moved[i].end, moved[i].unit, pulls[moved[i].entry]);
  });
}

}  // namespace

std::string instruction_set() {
  return kernels().instruction_set;
}

double sum_of_squares(const std::vector<AdamWEntry>& entries) {
  const std::vector<Chunk> chunks = chunks_of(entries);
  std::vector<double> partial(chunks.size());
  const AdamWKernels& k = kernels();
  for_each_chunk(chunks, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      partial[i] = k.sum_of_squares(entries[chunks[i].entry], chunks[i].begin, chunks[i].end);
  });
  double total = 0.0;  // in the order of the chunks, whoever summed them
  for (double p : partial) total += p;
  return total;
}

bool adamw(const std::vector<AdamWEntry>& entries, const std::vector<AdamWGroup>& groups, const AdamWControl& control) {
  const double scale = control.grad_scale ? *control.grad_scale : 1.0;
  const double norm = control.sum_of_squares ? square_root(*control.sum_of_squares) / scale : 0.0;
  if (adamw_skips(control.skip_nonfinite, norm, control.found_inf)) {
    if (control.skipped_steps) ++*control.skipped_steps;
    return true;
  }
  const std::vector<Chunk> chunks = chunks_of(entries);
  const AdamWKernels& k = kernels();
  const bool selective = std::any_of(entries.begin(), entries.end(), is_selective);
  std::vector<SelectiveSums> sums(selective ? chunks.size() : 0);
  for_each_chunk(chunks, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const AdamWEntry& e = entries[chunks[i].entry];
      const AdamWOptions& o = groups[e.group].options;
      k.update(e, chunks[i].begin, chunks[i].end, chunks[i].unit, o,
               adamw_grad_factor(scale, norm, control.max_grad_norm, o.maximize), selective ? &sums[i] : nullptr);
    }
  });
  if (selective) project(entries, groups, chunks, sums);
  return false;
}

}  // namespace fastft::cpu
