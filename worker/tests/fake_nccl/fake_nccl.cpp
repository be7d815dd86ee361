// A libnccl and a CUDA runtime over host memory, for tests on machines without a GPU. The ranks are threads of one process.
//
// Streams are threads that do what is enqueued in order. A sum meets the other ranks' in its stream; the last to come
// adds in the order of the ranks. A communicator is non-blocking as the real one is: what was begun goes on in
// ncclCommGetAsyncError, and a call that comes too early is refused. Any use of a freed communicator ends the process.
//
// What goes wrong is ordered by the fake_* functions at the end.

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace {

enum Result : int { Success = 0, SystemError = 2, InvalidArgument = 4, InvalidUsage = 5, RemoteError = 6, InProgress = 7 };
enum Type : int { Float32 = 7, Float64 = 8, Bfloat16 = 9 };
enum Fault : unsigned { HangInit = 1, HangSums = 2, HangAbort = 4, HangFinalize = 8 };

struct Stream {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::function<void()>> queue;
    bool is_blocked = false, is_stopping = false, is_working = false;
    std::thread thread{[this] { run(); }};

    void run() {
        std::unique_lock lock(mutex);
        for (;;) {
            changed.wait(lock, [this] { return is_stopping || (!is_blocked && !queue.empty()); });
            if (is_stopping) return;
            auto work = std::move(queue.front());
            queue.pop_front();
            is_working = true;
            lock.unlock();
            work();
            lock.lock();
            is_working = false;
            changed.notify_all();
        }
    }
    template <class Change> void change(Change what) {
        { std::lock_guard lock(mutex); what(); }
        changed.notify_all();
    }
    void push(std::function<void()> work) {
        change([&] { queue.push_back(std::move(work)); });
    }
};

// Streams may come to an event that was destroyed.
struct Event {
    std::mutex mutex;
    uint64_t recorded = 0, reached = 0;
};

// A sum at which the ranks meet.
struct Sum {
    std::vector<void *> buffers;
    size_t count = 0;
    int type = 0;
    int arrived = 0;
    bool is_done = false, is_broken = false;
};

// What the ranks of one communicator share.
struct Clique {
    std::mutex mutex;
    std::condition_variable changed;
    int world = 0, joined = 0;
    std::map<uint64_t, std::shared_ptr<Sum>> sums;
    // Sums end at once, with values that mean nothing: what a rank does to its peers whose communicator is told to end.
    bool is_rushed = false;
};

struct State {
    std::shared_ptr<Clique> clique;
    int rank = 0;
    uint64_t begun = 0;
    std::function<void()> launch;
    // Guarded by the clique's mutex.
    unsigned faults = 0;
    // From this sum on it takes part in none.
    uint64_t hangs_at = ~uint64_t(0);
    int error = Success;
    bool is_aborted = false, is_finalizing = false;
    // Sums whose memory is still used.
    int meeting = 0;
};

struct Comm {
    std::shared_ptr<State> state;
};

std::mutex world_mutex;
std::map<uint64_t, std::shared_ptr<Clique>> cliques;
std::set<Comm *> living;
uint64_t ids = 0;
thread_local unsigned next_faults = 0;

std::shared_ptr<State> state_of(void *comm) {
    std::lock_guard lock(world_mutex);
    if (!living.count(static_cast<Comm *>(comm))) {
        fprintf(stderr, "fake nccl: a communicator is used after it was freed\n");
        abort();
    }
    return static_cast<Comm *>(comm)->state;
}

void free_comm(void *comm) {
    state_of(comm);
    std::lock_guard lock(world_mutex);
    living.erase(static_cast<Comm *>(comm));
    delete static_cast<Comm *>(comm);
}

float from_bf16(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T> void add_up(Sum &sum) {
    std::vector<T> total(sum.count);
    memcpy(total.data(), sum.buffers[0], sum.count * sizeof(T));
    for (size_t rank = 1; rank < sum.buffers.size(); ++rank) {
        auto part = static_cast<const T *>(sum.buffers[rank]);
        for (size_t i = 0; i < sum.count; ++i) total[i] += part[i];
    }
    for (void *buffer : sum.buffers) memcpy(buffer, total.data(), sum.count * sizeof(T));
}

void add_up_bf16(Sum &sum) {
    std::vector<uint16_t> total(sum.count);
    for (size_t i = 0; i < sum.count; ++i) {
        float value = 0;
        for (void *buffer : sum.buffers) value += from_bf16(static_cast<uint16_t *>(buffer)[i]);
        total[i] = to_bf16(value);
    }
    for (void *buffer : sum.buffers) memcpy(buffer, total.data(), sum.count * 2);
}

// What lies in a buffer whose sum was ended: finite numbers.
void spoil(void *buffer, size_t count, int type) {
    memset(buffer, 0x3d, count * (type == Float64 ? 8 : type == Float32 ? 4 : 2));
}

// In the stream's thread.
void meet(const std::shared_ptr<State> &state, uint64_t number, void *buffer, size_t count, int type) {
    Clique &clique = *state->clique;
    std::unique_lock lock(clique.mutex);
    // Whoever has ended the communicator may have freed the memory.
    if (state->is_aborted) return;
    if (clique.is_rushed) return spoil(buffer, count, type);
    auto &place = clique.sums[number];
    if (!place) {
        place = std::make_shared<Sum>();
        place->buffers.resize(clique.world);
        place->count = count;
        place->type = type;
    }
    std::shared_ptr<Sum> sum = place;
    if (sum->count != count || sum->type != type) {
        state->error = InvalidArgument;
        sum->is_broken = true;
    }
    if (!(state->faults & HangSums) && number < state->hangs_at) {
        sum->buffers[state->rank] = buffer;
        if (++sum->arrived == clique.world && !sum->is_broken) {
            if (type == Float32) add_up<float>(*sum);
            if (type == Float64) add_up<double>(*sum);
            if (type == Bfloat16) add_up_bf16(*sum);
            sum->is_done = true;
            clique.sums.erase(number);
            clique.changed.notify_all();
        }
    }
    ++state->meeting;
    clique.changed.wait(lock, [&] { return sum->is_done || state->is_aborted || clique.is_rushed; });
    --state->meeting;
    if (!sum->is_done) {
        // This rank's buffer may be gone when the others come.
        sum->is_broken = true;
        spoil(buffer, count, type);
    }
    clique.changed.notify_all();
}

} // namespace

extern "C" {

int ncclGetVersion(int *version) {
    *version = 22809;
    return Success;
}

const char *ncclGetErrorString(int result) {
    return result == RemoteError ? "remote process exited or there was a network error" : "some error";
}

const char *ncclGetLastError(void *) { return "said by the fake"; }

struct Id {
    char bytes[128];
};

int ncclGetUniqueId(Id *id) {
    std::lock_guard lock(world_mutex);
    memset(id, 0x5a, sizeof *id);
    ++ids;
    memcpy(id->bytes, &ids, sizeof ids);
    return Success;
}

struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

int ncclCommInitRankConfig(void **comm, int world, Id id, int rank, Config *config) {
    if (config->magic != 0xcafebeef || config->blocking != 0 || rank < 0 || rank >= world) return InvalidArgument;
    uint64_t key;
    memcpy(&key, id.bytes, sizeof key);
    auto state = std::make_shared<State>();
    {
        std::lock_guard lock(world_mutex);
        if (key == 0 || key > ids) return InvalidArgument;
        auto &clique = cliques[key];
        if (!clique) clique = std::make_shared<Clique>();
        state->clique = clique;
    }
    {
        std::lock_guard lock(state->clique->mutex);
        state->rank = rank;
        state->faults = std::exchange(next_faults, 0);
        state->clique->world = world;
        if (!(state->faults & HangInit)) ++state->clique->joined;
    }
    auto made = new Comm{state};
    std::lock_guard lock(world_mutex);
    living.insert(made);
    *comm = made;
    return InProgress;
}

int ncclCommGetAsyncError(void *comm, int *result) {
    auto state = state_of(comm);
    auto launch = std::exchange(state->launch, nullptr);
    // The launch itself takes until the next look.
    if (launch) launch();
    std::lock_guard lock(state->clique->mutex);
    bool is_joined = state->clique->joined == state->clique->world;
    bool is_stuck = !is_joined || launch || (state->is_finalizing && (state->faults & HangFinalize));
    *result = state->error != Success ? state->error : is_stuck ? InProgress : Success;
    return Success;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, void *comm, void *stream) {
    auto state = state_of(comm);
    if (from != to || op != 0 || count == 0 || !stream) return InvalidArgument;
    if (type != Float32 && type != Float64 && type != Bfloat16) return InvalidArgument;
    if (state->launch || state->clique->joined != state->clique->world) return InvalidUsage;
    auto number = ++state->begun;
    state->launch = [=] {
        static_cast<Stream *>(stream)->push([=] { meet(state, number, to, count, type); });
    };
    return InProgress;
}

int ncclCommFinalize(void *comm) {
    auto state = state_of(comm);
    std::lock_guard lock(state->clique->mutex);
    state->is_finalizing = true;
    return InProgress;
}

int ncclCommDestroy(void *comm) {
    free_comm(comm);
    return Success;
}

int ncclCommAbort(void *comm) {
    auto state = state_of(comm);
    {
        std::unique_lock lock(state->clique->mutex);
        if (state->faults & HangAbort) state->clique->changed.wait(lock, [] { return false; });
        state->is_aborted = true;
        state->clique->changed.notify_all();
        state->clique->changed.wait(lock, [&] { return state->meeting == 0; });
    }
    free_comm(comm);
    return Success;
}

int cudaEventCreateWithFlags(void **event, unsigned) {
    *event = new std::shared_ptr<Event>(std::make_shared<Event>());
    return 0;
}

int cudaEventDestroy(void *event) {
    delete static_cast<std::shared_ptr<Event> *>(event);
    return 0;
}

int cudaEventRecord(void *handle, void *stream) {
    auto event = *static_cast<std::shared_ptr<Event> *>(handle);
    uint64_t number;
    {
        std::lock_guard lock(event->mutex);
        number = ++event->recorded;
    }
    static_cast<Stream *>(stream)->push([=] {
        std::lock_guard lock(event->mutex);
        event->reached = number;
    });
    return 0;
}

int cudaEventQuery(void *handle) {
    auto event = *static_cast<std::shared_ptr<Event> *>(handle);
    std::lock_guard lock(event->mutex);
    return event->reached == event->recorded ? 0 : 600;
}

int cudaGetLastError() { return 0; }

int cudaHostAlloc(void **memory, size_t bytes, unsigned flags) {
    if (flags != 3) return 1;
    *memory = calloc(1, bytes);
    return 0;
}

int cudaThreadExchangeStreamCaptureMode(unsigned *) { return 0; }
const char *cudaGetErrorString(int) { return "some CUDA error"; }

// The next communicator that this thread begins has these faults.
void fake_next_comm(unsigned faults) { next_faults = faults; }

void fake_set_faults(void *comm, unsigned faults) {
    auto state = state_of(comm);
    std::lock_guard lock(state->clique->mutex);
    state->faults = faults;
}

void fake_set_error(void *comm, int error) {
    auto state = state_of(comm);
    std::lock_guard lock(state->clique->mutex);
    state->error = error;
}

void fake_hang_at(void *comm, uint64_t sum) {
    auto state = state_of(comm);
    std::lock_guard lock(state->clique->mutex);
    state->hangs_at = sum;
}

void fake_rush(void *comm) {
    auto state = state_of(comm);
    { std::lock_guard lock(state->clique->mutex); state->clique->is_rushed = true; }
    state->clique->changed.notify_all();
}

void *fake_stream_create() { return new Stream; }

// A blocked stream does nothing, like one whose kernel never ends.
void fake_stream_block(void *stream, int is_blocked) {
    auto it = static_cast<Stream *>(stream);
    it->change([=] { it->is_blocked = is_blocked; });
}

// Returns when all that it was given is done.
void fake_stream_wait(void *stream) {
    auto it = static_cast<Stream *>(stream);
    std::unique_lock lock(it->mutex);
    it->changed.wait(lock, [it] { return it->queue.empty() && !it->is_working; });
}

// Returns when nothing is under way; what is still queued is dropped.
void fake_stream_destroy(void *stream) {
    auto it = static_cast<Stream *>(stream);
    it->change([=] { it->is_stopping = true; });
    it->thread.join();
    delete it;
}

// Communicators that were begun and not freed.
size_t fake_living_comms() {
    std::lock_guard lock(world_mutex);
    return living.size();
}
}
