// The twin is sl_serve/weights/direct_file.py, which says what direct reads need.
#include "reader.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include <fcntl.h>
#include <sys/uio.h>

namespace sl {
namespace {

struct Part {
  char* to;
  int64_t n_bytes;
};

// What is left of the parts after their first n bytes; returns how many there are.
int rest_of(const Part* parts, int n_parts, int64_t n, iovec* rest) {
  int n_rest = 0;
  for (int i = 0; i < n_parts; ++i) {
    const int64_t skipped = std::min(n, parts[i].n_bytes);
    n -= skipped;
    if (skipped < parts[i].n_bytes)
      rest[n_rest++] = {parts[i].to + skipped, static_cast<size_t>(parts[i].n_bytes - skipped)};
  }
  return n_rest;
}

// Fills the parts, one after another, from `offset`, or at least the first n_needed bytes of them
// where the file ends. ReadFailure::piece is for the caller to set.
std::optional<ReadFailure> fill(int file, const Part* parts, int n_parts, int64_t offset,
                                int64_t n_needed, int64_t block_bytes) {
  for (int64_t n_read = 0; n_read < n_needed;) {
    iovec rest[3];
    const int n_rest = rest_of(parts, n_parts, n_read, rest);
    const ssize_t n = preadv(file, rest, n_rest, offset + n_read);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ReadFailure{0, offset + n_read, errno};
    n_read += n;
    // A direct read that ends within a block has met the file's end.
    if (n == 0 || (n % block_bytes != 0 && n_read < n_needed))
      return ReadFailure{0, offset + n_read, 0};
  }
  return std::nullopt;
}

// All of the piece into the bounce and from there.
std::optional<ReadFailure> read_through(const Piece& p, char* bounce, int64_t block) {
  const int64_t start = p.offset / block * block, end = p.offset + p.n_bytes;
  const Part part{bounce, (end + block - 1) / block * block - start};
  const auto failure = fill(p.file, &part, 1, start, end - start, block);
  if (!failure) std::memcpy(p.to, bounce + p.offset - start, static_cast<size_t>(p.n_bytes));
  return failure;
}

// Whole blocks, [start, stop), straight to where they belong; of the one before and the one after,
// of which a part is wanted, through the bounce.
std::optional<ReadFailure> read_around(const Piece& p, char* bounce, int64_t block, int64_t start,
                                       int64_t stop) {
  const int64_t end = p.offset + p.n_bytes;
  const int64_t n_before = start - p.offset, n_after = end - stop;
  const Part parts[] = {{bounce, n_before ? block : 0},
                        {p.to + n_before, stop - start},
                        {bounce + block, n_after ? block : 0}};
  const int64_t first = start - parts[0].n_bytes;
  const auto failure = fill(p.file, parts, 3, first, end - first, block);
  if (failure) return failure;
  std::memcpy(p.to, bounce + block - n_before, static_cast<size_t>(n_before));
  std::memcpy(p.to + p.n_bytes - n_after, bounce + block, static_cast<size_t>(n_after));
  return std::nullopt;
}

std::optional<ReadFailure> read_direct(const Piece& p, char* bounce, int64_t block) {
  const int64_t start = (p.offset + block - 1) / block * block;
  const int64_t stop = (p.offset + p.n_bytes) / block * block;
  const bool are_alike = (reinterpret_cast<int64_t>(p.to) - p.offset) % block == 0;
  return are_alike && start < stop ? read_around(p, bounce, block, start, stop)
                                   : read_through(p, bounce, block);
}

std::optional<ReadFailure> read_buffered(const Piece& p) {
  const Part part{p.to, p.n_bytes};
  const auto failure = fill(p.file, &part, 1, p.offset, p.n_bytes, 1);
#ifdef POSIX_FADV_DONTNEED
  posix_fadvise(p.file, p.offset, p.n_bytes, POSIX_FADV_DONTNEED);
#endif
  return failure;
}

}  // namespace

Reading::Reading(std::vector<Piece> pieces) : pieces_(std::move(pieces)), n_left_(pieces_.size()) {}

std::optional<ReadFailure> Reading::wait() {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [this] { return n_left_ == 0; });
  return failure_;
}

void Reading::end(std::optional<ReadFailure> failure) {
  const std::lock_guard lock(mutex_);
  if (failure && !failure_) failure_ = failure;
  if (--n_left_ == 0) ended_.notify_all();
}

Reader::Reader(const std::vector<uintptr_t>& bounces, int64_t block_bytes)
    : bounces_(bounces), block_bytes_(block_bytes) {}

std::shared_ptr<Reading> Reader::begin(std::vector<Piece> pieces) {
  const auto reading = std::make_shared<Reading>(std::move(pieces));
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < reading->pieces_.size(); ++i) {
    if (is_closed_) {
      cancel({reading, i});
    } else {
      queue_.push_back({reading, i});
    }
  }
  if (threads_.empty() && !queue_.empty())
    for (const uintptr_t bounce : bounces_)
      threads_.emplace_back(&Reader::run, this, reinterpret_cast<char*>(bounce));
  changed_.notify_all();
  return reading;
}

void Reader::close() {
  std::deque<Item> dropped;
  {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    dropped.swap(queue_);
  }
  changed_.notify_all();
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
  for (const Item& item : dropped) cancel(item);
}

void Reader::cancel(const Item& item) {
  item.reading->end(ReadFailure{static_cast<int64_t>(item.piece),
                                item.reading->pieces_[item.piece].offset, ECANCELED});
}

void Reader::run(char* bounce) {
  for (;;) {
    Item item;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return is_closed_ || !queue_.empty(); });
      if (is_closed_) return;
      item = std::move(queue_.front());
      queue_.pop_front();
    }
    item.reading->end(read(item, bounce));
  }
}

std::optional<ReadFailure> Reader::read(const Item& item, char* bounce) const {
  const Piece& piece = item.reading->pieces_[item.piece];
  auto failure = piece.is_direct ? read_direct(piece, bounce, block_bytes_) : read_buffered(piece);
  if (failure) failure->piece = static_cast<int64_t>(item.piece);
  return failure;
}

}  // namespace sl
