#include "depthwise_plan.h"

#include <algorithm>
#include <numeric>

#include "sizes.h"

namespace jax_apt {
namespace {

constexpr int64_t kInt32Max = 2147483647;
constexpr int64_t kLine = 64;
constexpr int64_t kTasksPerWorker = 8;
constexpr int64_t kMostStretch = 64;        // pixels of a row at once
constexpr int64_t kHeldBytes = 128 * 1024;  // of rows, which stay in L1
constexpr int64_t kFewTerms = 64;  // sums that must be stored more often are better wide from the start

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
int64_t MaxCode(int bits) { return (int64_t{1} << (bits - 1)) - 1; }

class DepthwisePlanner {
 public:
  DepthwisePlanner(const Product& product, bool has_bytes, int workers)
      : product(product), g(product.geometry), kind(product.kind), workers(workers) {
    for (int d = 0; d < kSpace; ++d) {
      p.source[d] = kind == Kind::kInputGradient ? g.out[d] : g.in[d];
      p.pixels[d] = kind == Kind::kInputGradient ? g.in[d] : g.out[d];
    }
    ChooseWords(has_bytes);
  }

  DepthwisePlan Make(int64_t* scratch_bytes) {
    switch (kind) {
      case Kind::kForward: AddForwardPhase(); break;
      case Kind::kInputGradient: AddInputGradientPhases(); break;
      case Kind::kFilterGradient: AddFilterGradientPhase(); break;
    }
    FindColumns();
    ChooseBlocks();
    ShareOut();
    *scratch_bytes = LayOutScratch();
    return std::move(p);
  }

 private:
  const Product& product;
  const Geometry& g;
  const Kind kind;
  const int workers;
  DepthwisePlan p{};

  void ChooseWords(bool has_bytes) {
    const int lhs = product.lhs.bits, rhs = product.rhs.bits;
    p.safe_terms = kInt32Max / (MaxCode(lhs) * MaxCode(rhs));
    const int64_t least = kind == Kind::kFilterGradient ? kFewTerms : Volume(g.window);
    if (lhs > 16 || rhs > 16 || p.safe_terms < least) {
      p.group = 1;
      p.safe_terms = kInt32Max;  // of 46-bit products in 64 bits; FindError bounds the whole sum
    } else {
      p.group = has_bytes && lhs <= 8 && rhs <= 8 ? 4 : 2;
    }
  }

  // ---- What a row's pixels meet

  struct Tap {
    int64_t offset;
    int tap;
  };

  // Taps at equal distances, as many in a word as it holds.
  void AddPhase(int64_t first, int64_t count, std::vector<Tap> met) {
    std::sort(met.begin(), met.end(), [](const Tap& a, const Tap& b) { return a.offset < b.offset; });
    const int before = static_cast<int>(p.taps.size());
    for (size_t i = 0; i < met.size(); i += p.group) {
      WordTaps word{met[i].offset, {-1, -1, -1, -1}};
      for (size_t k = 0; k < static_cast<size_t>(p.group) && i + k < met.size(); ++k)
        word.tap[k] = met[i + k].tap;
      p.taps.push_back(word);
    }
    p.phases.push_back({first, count, before, static_cast<int>(p.taps.size()) - before});
  }

  void AddForwardPhase() {
    p.step = 1, p.stride = g.stride[2], p.spacing = g.dilation[2];
    std::vector<Tap> met;
    for (int64_t t = 0; t < g.window[2]; ++t)
      met.push_back({t * g.dilation[2] - g.pad[2], static_cast<int>(t)});
    AddPhase(0, g.out[2], std::move(met));
  }

  // Pixel x of dx meets pixel (x + pad - tap * dilation) / stride of dy where that is whole.
  void AddInputGradientPhases() {
    p.step = g.stride[2], p.stride = 1, p.spacing = g.dilation[2] / std::gcd(g.stride[2], g.dilation[2]);
    for (int64_t f = 0; f < std::min(g.stride[2], g.in[2]); ++f) {
      std::vector<Tap> met;
      for (int64_t t = 0; t < g.window[2]; ++t) {
        const int64_t place = f + g.pad[2] - t * g.dilation[2];
        if (place % g.stride[2] == 0) met.push_back({place / g.stride[2], static_cast<int>(t)});
      }
      AddPhase(f, CeilDiv(g.in[2] - f, g.stride[2]), std::move(met));
    }
  }

  void AddFilterGradientPhase() {
    p.step = 1, p.stride = p.spacing = g.stride[2];
    for (int t = 0; t < g.window[2]; ++t) p.taps.push_back({t * g.dilation[2] - g.pad[2], {t, -1, -1, -1}});
    p.phases.push_back({0, g.out[2], 0, static_cast<int>(g.window[2])});
  }

  void FindColumns() {
    const int64_t most = p.phases.empty() ? 0 : p.phases[0].count;  // later phases have no more
    int64_t longest = kMostStretch;
    if (kind == Kind::kFilterGradient) longest = std::min(longest, p.safe_terms) / kMostGroup * kMostGroup;
    p.stretches = std::max<int64_t>(1, CeilDiv(most, longest));
    p.stretch = RoundUp(CeilDiv(most, p.stretches), kMostGroup);
    const auto by_offset = [](const WordTaps& a, const WordTaps& b) { return a.offset < b.offset; };
    const auto ends = std::minmax_element(p.taps.begin(), p.taps.end(), by_offset);
    if (p.taps.empty() || p.stretch == 0) return;
    p.first_column = ends.first->offset;
    p.is_needed.resize((p.stretch - 1) * p.stride + ends.second->offset - p.first_column + 1);
    for (const WordTaps& w : p.taps)
      for (int64_t i = 0; i < p.stretch; i += kind == Kind::kFilterGradient ? p.group : 1)
        p.is_needed[i * p.stride + w.offset - p.first_column] = 1;
  }

  // ---- Tasks

  void ChooseBlocks() {
    p.padded = RoundUp(g.in_channels, kChannelUnit);
    const auto columns = static_cast<int64_t>(p.is_needed.size());
    int64_t span = (g.window[1] - 1) * g.dilation[1];
    if (kind == Kind::kInputGradient) span /= g.stride[1];
    const auto fitting = [&](int64_t rows) {
      return kHeldBytes / std::max<int64_t>(1, g.window[0] * rows * columns * int64_t{sizeof(uint32_t)});
    };
    p.held_rows = span + 1;
    p.is_ring = g.window[0] * p.held_rows <= kMaxHeldRows &&
                (fitting(p.held_rows) >= kChannelUnit || p.held_rows <= 2 * g.window[1]);
    if (!p.is_ring) p.held_rows = g.window[1];
    p.block = std::max(fitting(p.held_rows) / kChannelUnit * kChannelUnit, kChannelUnit);
    p.blocks = CeilDiv(p.padded, p.block);
    p.block = RoundUp(CeilDiv(p.padded, p.blocks), kChannelUnit);
    p.blocks = CeilDiv(p.padded, p.block);
  }

  // Few rows make a task only if there are not enough channels: its first rows are read twice.
  void ShareOut() {
    const int64_t wanted = workers > 1 ? kTasksPerWorker * workers : 1;
    const int64_t planes = std::max<int64_t>(1, g.batch * p.pixels[0] * p.stretches);
    p.block_tasks = std::min(p.blocks, CeilDiv(wanted, planes));
    const int64_t pieces =
        std::min(std::max<int64_t>(1, p.pixels[1]), CeilDiv(wanted, planes * p.block_tasks));
    p.rows = std::max<int64_t>(1, CeilDiv(p.pixels[1], pieces));
    p.row_tasks = CeilDiv(p.pixels[1], p.rows);
  }

  // ---- Scratch

  int64_t LayOutScratch() {
    const int64_t filter_rows = g.window[0] * g.window[1], word = sizeof(uint32_t);
    const bool is_filter = kind == Kind::kFilterGradient;
    const int64_t packed = is_filter ? 0 : static_cast<int64_t>(p.taps.size()) * filter_rows;
    const int64_t offsets = is_filter ? 0 : static_cast<int64_t>(p.phases.size()) * filter_rows;
    p.offset_at = packed * p.padded * word;
    p.zeros_at = p.offset_at + offsets * p.padded * word;
    p.worker_at = RoundUp(p.zeros_at + 2 * p.padded, kLine);
    p.row_words = static_cast<int64_t>(p.is_needed.size()) * p.block;
    p.dy_at = g.window[0] * p.held_rows * p.row_words * word;
    p.sums_at = p.dy_at;
    if (is_filter) p.sums_at += CeilDiv(p.stretch, p.group) * p.block * word;
    const int64_t sum = p.group == 1 ? sizeof(int64_t) : sizeof(uint32_t);
    p.totals_at = RoundUp(p.sums_at, kLine);
    if (is_filter) p.totals_at = RoundUp(p.sums_at + Volume(g.window) * p.block * sum, kLine);
    p.worker_bytes = p.totals_at;
    if (is_filter) p.worker_bytes += Volume(g.window) * p.padded * int64_t{sizeof(int64_t)};
    // An odd number of lines apart.
    p.worker_bytes = RoundUp(p.worker_bytes, 2 * kLine) + kLine;
    return p.worker_at + workers * p.worker_bytes;
  }
};

}  // namespace

bool IsDepthwise(const Geometry& g) {
  return g.groups > 1 && g.in_channels == g.groups && g.out_channels == g.groups &&
         Volume(g.window) <= kMaxTaps;
}

DepthwisePlan MakeDepthwisePlan(const Product& product, bool has_bytes, int workers, int64_t* scratch_bytes) {
  return DepthwisePlanner(product, has_bytes, workers).Make(scratch_bytes);
}

}  // namespace jax_apt
