// One pool of threads that stays: a decode step deals out work a hundred times, and starting or waking a thread costs
// more than many of those pieces of work take.
//
// An idle helper spins for a bounded time, then yields its core between looks, then sleeps. Work is taken index by
// index, so a helper whose core another process holds delays nothing but the index that it works on.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

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
        if (count < threads) threads = int(count);
        if (threads <= 1) {
            for (int64_t i = 0; i < count; ++i) work(i, 0);
            return;
        }
        std::lock_guard<std::mutex> lock(callers_);
        for (; helpers_ < threads - 1; ++helpers_) std::thread(&Pool::help, this, helpers_ + 1).detach();
        call_.store([](void* context, int64_t i, int t) { (*static_cast<std::remove_reference_t<Work>*>(context))(i, t); },
                    std::memory_order_relaxed);
        context_.store(const_cast<void*>(static_cast<const void*>(&work)), std::memory_order_relaxed);
        count_.store(count, std::memory_order_relaxed);
        threads_.store(threads, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        ticket_.store(++epoch_ << 32 | uint64_t(count));
        if (asleep_.load() > 0) {
            std::lock_guard<std::mutex> sleep(sleep_);
            awake_.notify_all();
        }
        take(0);
        for (int spins = 0; done_.load(std::memory_order_acquire) < count; ++spins)
            spins < kSpins ? pause() : void(sched_yield());
    }

private:
    static constexpr int kSpins = 1000;  // some ten microseconds
    static constexpr std::chrono::microseconds kSpinTime{50}, kYieldTime{2000};

    std::mutex callers_, sleep_;
    std::condition_variable awake_;
    int helpers_ = 0;
    uint64_t epoch_ = 0;
    std::atomic<void (*)(void*, int64_t, int)> call_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<int64_t> count_{0};
    std::atomic<int> threads_{0}, asleep_{0};
    // The call's number, and how many of its indices nobody has taken. A helper that comes late, with what it read of
    // an earlier call, fails to exchange the ticket.
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int64_t> done_{0};

    static std::atomic<Pool*>& instance() {
        static std::atomic<Pool*> pool{nullptr};
        return pool;
    }

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }

    bool wanted(int thread) {
        return uint32_t(ticket_.load()) > 0 && thread < threads_.load(std::memory_order_relaxed);
    }

    void take(int thread) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        while (uint32_t(ticket) > 0 && thread < threads_.load(std::memory_order_relaxed)) {
            const auto call = call_.load(std::memory_order_relaxed);
            void* const context = context_.load(std::memory_order_relaxed);
            const int64_t count = count_.load(std::memory_order_relaxed);
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
            call(context, count - uint32_t(ticket), thread);
            done_.fetch_add(1, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void help(int thread) {
        for (;;) {
            take(thread);
            const auto since = std::chrono::steady_clock::now();
            for (int spins = 0; !wanted(thread); ++spins) {
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
                awake_.wait(lock, [&] { return wanted(thread); });
                --asleep_;
            }
        }
    }
};

}  // namespace compress
