// Reads pieces of files into memory, several at a time, on threads of its own: between two reads a
// thread needs nothing of the rest of the process, so the disk has a queue however busy that is.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

namespace sl {

// Bytes [offset, offset + n_bytes) of an open file, and where they belong. A direct file's reads
// must be whole blocks.
struct Piece {
  int file;
  bool is_direct;
  int64_t offset, n_bytes;
  char* to;
};

// The first piece that failed, and at which byte of its file: errno, or 0 where the file ends there.
struct ReadFailure {
  int64_t piece, at_byte;
  int error;
};

// Pieces that are read together.
class Reading {
 public:
  explicit Reading(std::vector<Piece> pieces);
  // Blocks until no piece is under way any more.
  std::optional<ReadFailure> wait();

 private:
  friend class Reader;
  void end(std::optional<ReadFailure> failure);

  const std::vector<Piece> pieces_;
  std::mutex mutex_;
  std::condition_variable ended_;
  size_t n_left_;
  std::optional<ReadFailure> failure_;
};

class Reader {
 public:
  // One thread for each of `bounces`, begun with the first piece: memory that begins at a block,
  // holds any piece and the blocks that its ends lie in, and outlives the reader.
  Reader(const std::vector<uintptr_t>& bounces, int64_t block_bytes);
  ~Reader() { close(); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  std::shared_ptr<Reading> begin(std::vector<Piece> pieces);
  // When it returns nothing is written any more; what had not begun has failed with ECANCELED.
  void close();

 private:
  struct Item {
    std::shared_ptr<Reading> reading;
    size_t piece;
  };
  static void cancel(const Item& item);
  void run(char* bounce);
  std::optional<ReadFailure> read(const Item& item, char* bounce) const;

  const std::vector<uintptr_t> bounces_;
  const int64_t block_bytes_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  bool is_closed_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace sl
