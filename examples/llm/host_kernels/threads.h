// The threads that compute, which all of a process share.
//
//
// They sleep when there is nothing to do, never spin, and end with the process. One caller at a time
// has them; another computes alone meanwhile. A caller waits for those only that have begun: one
// whose core is taken is left out. Work is dealt out in pieces, a few at a
// time.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <pthread.h>
#include <signal.h>
#include <thread>

namespace host {

struct Task {
    void (*const piece)(const void *given, int64_t start, int64_t end);
    const void *const given;
    const int64_t end, step;
    std::atomic<int64_t> next{0};
    void work() {
        for (;;) {
            int64_t start = next.fetch_add(step, std::memory_order_relaxed);
            if (start >= end)
                return;
            piece(given, start, start + step < end ? start + step : end);
        }
    }
};

struct Pool {
    std::mutex taken, lock;
    std::condition_variable wake, done;
    Task *task = nullptr;
    int wanted = 0, active = 0, threads = 0;

    void run(Task &own, int helpers) {
        std::unique_lock<std::mutex> mine(taken, std::try_to_lock);
        if (helpers > 0 && mine.owns_lock()) {
            grow(helpers);
            std::lock_guard<std::mutex> held(lock);
            task = &own, wanted = helpers < threads ? helpers : threads;
            if (wanted == 1)
                wake.notify_one();
            else if (wanted)
                wake.notify_all();
        }
        own.work();
        if (helpers > 0 && mine.owns_lock()) {
            std::unique_lock<std::mutex> held(lock);
            wanted = 0;
            done.wait(held, [this] { return active == 0; });
            task = nullptr;
        }
    }

    void grow(int count) {
        sigset_t every, before;
        sigfillset(&every); // signals are for the interpreter's threads, but for one's own faults
        for (int fault : {SIGBUS, SIGFPE, SIGILL, SIGSEGV})
            sigdelset(&every, fault);
        pthread_sigmask(SIG_SETMASK, &every, &before);
        try {
            for (; threads < count; ++threads)
                std::thread([this] { serve(); }).detach();
        } catch (...) { // no more threads: those that there are
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void serve() {
        std::unique_lock<std::mutex> held(lock);
        for (;;) {
            wake.wait(held, [this] { return wanted > 0; });
            --wanted, ++active;
            Task *own = task;
            held.unlock();
            own->work();
            held.lock();
            if (--active == 0)
                done.notify_one();
        }
    }
};

inline Pool *pool; // never freed: its threads may sleep there when the process ends

inline void forget_threads() { pool = new (std::nothrow) Pool; } // a forked child has none of them

struct Opened {
    Opened() {
        forget_threads();
        pthread_atfork(nullptr, nullptr, forget_threads);
    }
};

inline Opened opened;

// Has all pieces of a task done, by so many threads beside the caller's.
inline void share_out(Task &task, int helpers) {
    if (helpers > 0 && pool)
        pool->run(task, helpers);
    else
        task.work();
}

constexpr int64_t WORTH_A_THREAD = 256 << 10; // bytes

} // namespace host
