// One pool of threads that stays: a decode step deals out work a hundred times, and starting or waking a thread costs
// more than many of those pieces of work take.
//
// Every thread has a share of neighbouring indices, which it takes one by one from the first on, and takes half of what
// another has left when its own has ended: memory is read in one stream a thread (dealt out in turns, two threads read
// 36 GB/s of 4-bit weights where shares read 46), and a helper whose core another process holds delays little more than
// the index that it works on. An idle helper spins for a bounded time, then yields its core between looks, then sleeps.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#include "scalars.h"

namespace compress {

class Pool {
public:
    // The pool of this process: a child of fork() gets one of its own, because threads do not cross a fork.
    static Pool& shared() {
        static std::once_flag once;
        std::call_once(once, [] {
            instance().store(new Pool);
            pthread_atfork(nullptr, nullptr, [] { instance().store(new Pool); });
        });
        return *instance().load();
    }

    // Calls work(index, thread) for every index below `count`, on at most `threads` threads; `thread` is below that.
    // `work` must not throw, nor call run() again.
    template <typename Work>
    void run(int64_t count, int threads, Work&& work) {
        threads = int(least(least(threads, kMostThreads), count));
        if (threads <= 1) {
            for (int64_t i = 0; i < count; ++i) work(i, 0);
            return;
        }
        std::lock_guard<std::mutex> lock(callers_);
        for (; helpers_ < threads - 1; ++helpers_) std::thread(&Pool::help, this, helpers_ + 1).detach();
        call_.store([](void* context, int64_t i, int t) { (*static_cast<std::remove_reference_t<Work>*>(context))(i, t); },
                    std::memory_order_relaxed);
        context_.store(const_cast<void*>(static_cast<const void*>(&work)), std::memory_order_relaxed);
        const int64_t together = ceil_div(count, kMostParts), parts = ceil_div(count, together);
        count_.store(count, std::memory_order_relaxed);
        together_.store(together, std::memory_order_relaxed);
        threads_.store(threads, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint32_t number = number_.load(std::memory_order_relaxed) + 1;
        for (int t = 0; t < threads; ++t)
            shares_[t].left.store(Left{number, uint32_t(parts * t / threads), uint32_t(parts * (t + 1) / threads)}.word(),
                                  std::memory_order_release);
        number_.store(number);
        if (asleep_.load() > 0) {
            std::lock_guard<std::mutex> sleep(sleep_);
            awake_.notify_all();
        }
        take(0);
        for (int spins = 0; done_.load(std::memory_order_acquire) < parts; ++spins)
            spins < kSpins ? pause() : void(sched_yield());
    }

private:
    static constexpr int kSpins = 1000;  // some ten microseconds
    static constexpr int kMostThreads = 256;
    static constexpr int64_t kMostParts = 0xffff;  // where there are more indices, several neighbours are one part
    static constexpr std::chrono::microseconds kSpinTime{50}, kYieldTime{2000};

    // The number of a call, and the parts of a share that nobody has taken. One with parts is of the call that is
    // running, which cannot end before they are taken; who comes late, with what was read of an earlier call, fails to
    // exchange the word.
    struct Left {
        uint32_t number, begin, end;
        explicit Left(uint64_t word) : number(word >> 32), begin(word >> 16 & kMostParts), end(word & kMostParts) {}
        Left(uint32_t number, uint32_t begin, uint32_t end) : number(number), begin(begin), end(end) {}
        uint64_t word() const { return uint64_t(number) << 32 | begin << 16 | end; }
    };
    struct alignas(64) Share {
        std::atomic<uint64_t> left{0};
    };

    std::mutex callers_, sleep_;
    std::condition_variable awake_;
    int helpers_ = 0;
    std::atomic<void (*)(void*, int64_t, int)> call_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int64_t> count_{0}, together_{0};
    std::atomic<int> threads_{0}, asleep_{0};
    Share shares_[kMostThreads];
    alignas(64) std::atomic<uint32_t> number_{0};
    alignas(64) std::atomic<int64_t> done_{0};  // parts

    static std::atomic<Pool*>& instance() {
        static std::atomic<Pool*> pool{nullptr};
        return pool;
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }

    // Takes parts of the running call until there are none.
    void take(int thread) {
        int64_t done = 0;
        for (bool found = true; found;) {
            done += take_own(thread);
            found = false;
            const int threads = threads_.load(std::memory_order_relaxed);
            for (int t = 1; t < threads && !found; ++t) found = halve(shares_[(thread + t) % threads], thread);
        }
        done_.fetch_add(done, std::memory_order_release);
    }

    // Takes the parts of a thread's own share, one by one. Returns how many.
    int64_t take_own(int thread) {
        std::atomic<uint64_t>& left = shares_[thread].left;
        uint64_t word = left.load(std::memory_order_acquire);
        for (int64_t done = 0;;) {
            const Left now(word);
            if (now.begin >= now.end) return done;
            const auto call = call_.load(std::memory_order_relaxed);
            void* const context = context_.load(std::memory_order_relaxed);
            const int64_t together = together_.load(std::memory_order_relaxed), first = now.begin * together;
            const int64_t end = least(first + together, count_.load(std::memory_order_relaxed));
            const Left rest(now.number, now.begin + 1, now.end);
            if (!left.compare_exchange_weak(word, rest.word(), std::memory_order_acq_rel)) continue;
            for (int64_t i = first; i < end; ++i) call(context, i, thread);
            ++done;
            word = left.load(std::memory_order_acquire);
        }
    }

    // Moves the further half of what another share has left to a thread's own, once that has ended. False if there is
    // nothing to take.
    bool halve(Share& other, int thread) {
        std::atomic<uint64_t>& own = shares_[thread].left;
        uint64_t word = other.left.load(std::memory_order_acquire);
        for (;;) {
            const Left now(word);
            if (now.begin >= now.end || thread >= threads_.load(std::memory_order_relaxed)) return false;
            // Shares are dealt out before the call's number is there, this thread's own perhaps just now.
            if (now.number != number_.load(std::memory_order_acquire)) return false;
            if (const Left mine(own.load(std::memory_order_acquire)); mine.begin < mine.end) return true;
            const uint32_t middle = now.begin + (now.end - now.begin) / 2;
            const Left rest(now.number, now.begin, middle), moved(now.number, middle, now.end);
            if (!other.left.compare_exchange_weak(word, rest.word(), std::memory_order_acq_rel)) continue;
            own.store(moved.word(), std::memory_order_release);
            return true;
        }
    }

    void help(int thread) {
        for (;;) {
            const uint32_t seen = number_.load();
            const auto wanted = [&] { return number_.load() != seen && thread < threads_.load(std::memory_order_relaxed); };
            take(thread);
            const auto since = std::chrono::steady_clock::now();
            for (int spins = 0; !wanted(); ++spins) {
                pause();
                if (spins % 64 != 0) continue;
                const auto waited = std::chrono::steady_clock::now() - since;
                if (waited < kSpinTime) continue;
                if (waited < kYieldTime) {
                    sched_yield();
                    spins = -1;
                    continue;
                }
                std::unique_lock<std::mutex> lock(sleep_);
                ++asleep_;
                awake_.wait(lock, wanted);
                --asleep_;
            }
        }
    }
};

}  // namespace compress
