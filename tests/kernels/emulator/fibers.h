// Fibers: all of them in one thread of the system, and each a thread to ThreadSanitizer, which is told of no order
// between two of them beyond what they make themselves. Who has to wait steps aside, and the next that can goes on.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define EMU_UNSEEN __attribute__((no_sanitize_thread, noinline))  // by ThreadSanitizer
#else
#define EMU_UNSEEN
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_release(void*) {}
inline void __tsan_acquire(void*) {}
#endif

namespace emu {

[[noreturn]] inline void fail(const char* what) {
  std::printf("FAIL emulator: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

class Fiber {
 public:
  // What it waits for: nothing; a word that is another; that nobody else can go on; that, or a word as large.
  enum class State { idle, ready, other, last, late };
  EMU_UNSEEN Fiber(std::function<void()> job, void* own) : own_(own), job_(std::move(job)) {
    constexpr size_t bytes = 256 << 10;
    void* stack = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack, context_.uc_stack.ss_size = bytes, context_.uc_link = nullptr;
    makecontext(&context_, begin, 0);
  }
  Fiber(const Fiber&) = delete;
  EMU_UNSEEN static Fiber& current() { return *current_; }
  EMU_UNSEEN void* own() const { return own_; }
  EMU_UNSEEN bool is(State state) const { return state_ == state; }
  EMU_UNSEEN bool can_go_on() const {
    return state_ == State::ready || (state_ == State::other && *word_ != value_) ||
           (state_ == State::late && *word_ >= value_);
  }
  // `sync`: all that the caller has done is before what comes.
  EMU_UNSEEN void go_on(bool sync = false) {
    current_ = this, state_ = State::ready, caller_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(seen_, sync ? 0 : 1);
    swapcontext(&home_, &context_);
  }
  EMU_UNSEEN void step_aside(State state, const void* word = nullptr, unsigned value = 0) {
    state_ = state, word_ = static_cast<const volatile unsigned*>(word), value_ = value;
    __tsan_switch_to_fiber(caller_, 1);
    swapcontext(&context_, &home_);
  }

 private:
  EMU_UNSEEN static void begin() {
    for (Fiber& me = *current_;; me.step_aside(State::idle)) me.job_();
  }
  static inline Fiber* current_ = nullptr;
  void* own_;
  std::function<void()> job_;
  void *seen_ = __tsan_create_fiber(0), *caller_ = nullptr;  // made here: the job was there before
  ucontext_t context_, home_;
  State state_ = State::idle;
  const volatile unsigned* word_ = nullptr;
  unsigned value_ = 0;
};

inline void wait_while(uint32_t& word, uint32_t value) {
  while (std::atomic_ref<uint32_t>(word).load() == value)
    Fiber::current().step_aside(Fiber::State::other, &word, value);
}
template <class T>
void wait_while(std::atomic<T>& word, T value) {
  while (word.load() == value) Fiber::current().step_aside(Fiber::State::other, &word, unsigned(value));
}

// A fiber that does its job once all others wait, if it has been woken.
class Helper {
 public:
  EMU_UNSEEN explicit Helper(std::function<void()> job) : fiber_(std::move(job), nullptr), next_(first_) {
    first_ = this, ++count_;
  }
  EMU_UNSEEN void wake() { awake_ = true; }
  // One of those that are awake, by `luck`.
  EMU_UNSEEN static bool go_on(unsigned luck) {
    Helper* found = nullptr;
    unsigned skip = count_ == 0 ? 0 : (luck >> 16) % count_;
    for (Helper* helper = first_; helper != nullptr && (found == nullptr || skip > 0); helper = helper->next_) {
      if (helper->awake_) found = helper;
      skip -= skip > 0;
    }
    if (found == nullptr) return false;
    found->awake_ = false, found->fiber_.go_on();
    return true;
  }

 private:
  static inline Helper* first_ = nullptr;
  static inline unsigned count_ = 0;
  bool awake_ = false;
  Fiber fiber_;
  Helper* next_;
};

// Fibers that stay from one run to the next, with a T each.
template <class T>
class Fibers {
 public:
  static Fibers& instance() {
    static Fibers* fibers = new Fibers;  // they never end
    return *fibers;
  }
  void run(unsigned count, const std::function<void(unsigned)>& job) {
    job_ = &job, left_ = count, backwards_ = !backwards_;
    for (unsigned i = unsigned(all_.size()); i < count; ++i)
      all_.emplace_back(new Fiber([this, i] { (*job_)(i), --left_; }, new T));
    for (unsigned i = 0; i < count; ++i) at(i, count).go_on(true);
    while (left_ != 0)  // none of them is before this, so that no order comes of it
      if (!pass(count)) fail("all threads wait");
  }

 private:
  Fiber& at(unsigned i, unsigned count) { return *all_[backwards_ ? count - 1 - i : i]; }
  bool pass(unsigned count) {
    bool moved = false;
    for (unsigned i = 0; i < count; ++i)
      if (Fiber& fiber = at(i, count); fiber.can_go_on()) fiber.go_on(), moved = true;
    if (moved || Helper::go_on(luck_ = luck_ * 1664525 + 1013904223)) return true;
    for (auto state : {Fiber::State::last, Fiber::State::late}) {
      for (unsigned i = 0; i < count; ++i)
        if (Fiber& fiber = at(i, count); fiber.is(state)) fiber.go_on(), moved = true;
      if (moved) return true;
    }
    return false;
  }
  std::vector<std::unique_ptr<Fiber>> all_;
  const std::function<void(unsigned)>* job_ = nullptr;
  std::atomic<unsigned> left_{0};
  bool backwards_ = true;
  unsigned luck_ = 1;
};

}  // namespace emu
