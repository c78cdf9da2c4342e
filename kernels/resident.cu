// One kernel that stays on a GPU of its own and computes call after call of few tokens: what a
// launch costs is gone. All of its blocks run at once, one on each multiprocessor.
//
// The host puts commands into a mailbox in its own memory. The leader, block 0, looks for the next
// one and passes it on in device memory. Then all blocks compute gate and up, meet, compute down, and
// the last one tells the host. The kernel ends when the host says so, or when no command has come for a while: then the host launches
// the next, which goes on where this one has ended.
#include "admit.cuh"
#include "decode_mma.cuh"

#if HAS_MMA

#define BLOCK (DOWN_WARPS * 32)
#define TEAMS (DOWN_WARPS / GATE_UP_WARPS)
#define TEAM (GATE_UP_WARPS * 32)
#define MAILBOX_COMMANDS 16
// Of 32 bits.
#define COMMAND_WORDS 128
// Pairs of a single token that a command has room for.
#define COMMAND_PAIRS 16

enum { COMPUTE = 0, STOP = 1 };

// What the host asks for; moeshm/backends/gpu/abi.py.
struct Command {
    Call call;          // x is where `admitted` has it, if it is brought; ids and weights, too
    Asked asked;        // ids are null where the pairs are below
    Admitted admitted;
    u32* done;          // set to done_value when out is written; may be null
    u32 done_value;
    u32 what;
    u32 launch;         // of STOP: the last kernel that it is for
    u32 number;         // its own
    u64 expert[COMMAND_PAIRS];  // where each is; 0 for an empty slot
    float weight[COMMAND_PAIRS];
    short slot[COMMAND_PAIRS];
    u32 padding[20];
};
static_assert(sizeof(Command) == COMMAND_WORDS * 4, "a lane brings 16 bytes of a command");

// A command as it travels: each word has the command's number beside it, or the round's, so that one
// look says whether all of it is there.
struct Letter {
    vec16 words[COMMAND_WORDS / 2];
};

// In the host's memory.
struct Mailbox {
    Letter letters[MAILBOX_COMMANDS];
    u32 finished;  // the number of the last command whose work is done
    u32 padding[31];
    u32 ended;     // the last kernel that takes no more commands
};

// In device memory, and kept from kernel to kernel. Counts go on; each is alone in its sector.
struct Rooms {
    u32 next;        // the number of the next command
    u32 round;       // how often something was passed on
    u32 n_computed;  // of these, how often it was a call
    u32 stopped;     // kernels up to this one end at once
    u32 padding[4];
    u32 n_x;         // blocks that have brought their part; 0 between calls
    u32 padding_x[7];
    u32 x;           // the last round whose activations are there
    u32 padding_bell[7];
    u32 n_inner;     // blocks that have done gate and up, of all calls
    u32 padding_inner[7];
    u32 n_finished;  // blocks that are through, of all rounds
    u32 padding_finished[7];
    Letter letter;   // the round's command
};

struct Resident {
    Mailbox* mailbox;
    Rooms* rooms;
    u64 idle_ns;  // without a command, after which it ends
    u32 launch;   // its number, rising
};

// How far a block is; in shared memory, as registers are for weights.
struct Progress {
    u32 next;
    u32 round;
    u32 n_computed;
    u32 stopped;  // as of Rooms; written there once every block has begun
};

DEVICE bool has_reached(u32 count, u32 value) { return (int)(count - value) >= 0; }

// The thread; it sees afterwards what was written before the count.
DEVICE void await_count(const u32* count, u32 value) {
    while (!has_reached(load_acquire(count), value)) {
    }
}

// The whole block, after what it wrote; what this was counted for is seen by who awaits the count.
DEVICE u32 count_block(u32* count) {
    __syncthreads();
    if (threadIdx.x != 0) return 0;
    fence_device();
    return atomicAdd(count, 1u) + 1;
}

// --- letters ------------------------------------------------------------------------------

// By one warp: one look for the letter of that number.
DEVICE bool look_for(const Letter* letter, u32 number, Command& command) {
    const int lane = threadIdx.x;
    u32* words = (u32*)&command;
    const vec16 first = load_now(&letter->words[lane]);
    const vec16 second = load_now(&letter->words[lane + 32]);
    const bool is_mine = first.word[1] == number && first.word[3] == number &&
                         second.word[1] == number && second.word[3] == number;
    if (BALLOT(is_mine) != 0xffffffffu) return false;
    words[2 * lane] = first.word[0];
    words[2 * lane + 1] = first.word[2];
    words[2 * lane + 64] = second.word[0];
    words[2 * lane + 65] = second.word[2];
    SYNC_WARP();
    return true;
}

// By the first threads of a block.
DEVICE void write_letter(Letter* letter, u32 number, const Command& command) {
    const int i = threadIdx.x;
    const u32* words = (const u32*)&command;
    if (i < COMMAND_WORDS / 2)
        store_now(&letter->words[i], vec16{{words[2 * i], number, words[2 * i + 1], number}});
}

// --- the leader's part --------------------------------------------------------------------

// By one warp: waits for the command, at most idle_ns; false if this kernel is to end.
DEVICE bool receive(const Resident& resident, u32 number, Command& command) {
    Mailbox* mailbox = resident.mailbox;
    const Letter* letter = &mailbox->letters[number % MAILBOX_COMMANDS];
    const u64 start = now_ns();
    while (true) {
        wait_for_host();
        if (look_for(letter, number, command)) return true;
        // All lanes or none, whose clocks may differ.
        if (BALLOT(now_ns() - start < resident.idle_ns)) continue;
        // Said before the last look: the host looks for this after it has put a command there.
        if (threadIdx.x == 0) *(volatile u32*)&mailbox->ended = resident.launch;
        fence_system();
        SYNC_WARP();
        if (!look_for(letter, number, command)) return false;
        if (threadIdx.x == 0) *(volatile u32*)&mailbox->ended = resident.launch - 1;
        return true;
    }
}

// A single token's pairs, from where the command says, into the command itself.
DEVICE void read_pairs(Command& command) {
    const Asked& asked = command.asked;
    const int pair = threadIdx.x;
    if (pair < asked.n_pairs) {
        const int slot = admit_id(asked, command.admitted, pair);
        command.weight[pair] = asked.weights[pair];
        command.slot[pair] = (short)slot;
        command.expert[pair] = slot < 0 ? 0 : command.call.experts[slot];
    }
    __syncthreads();
    if (pair == 0) command.asked.ids = 0;
    __syncthreads();
}

// Waits for the next command and passes it on; the other blocks are told to stop if none comes.
DEVICE void lead(const Resident& resident, Progress& progress, Command& command) {
    Rooms* rooms = resident.rooms;
    if (threadIdx.x < 32) {
        u32 next = progress.next;
        bool is_there = receive(resident, next, command);
        // What was to stop another kernel, and came too late for it.
        while (is_there && command.what == STOP && (int)(resident.launch - command.launch) > 0)
            is_there = receive(resident, ++next, command);
        // Arrays were written before the command.
        fence_system();
        if (threadIdx.x == 0) {
            if (!is_there) command.what = STOP;
            progress.next = next + is_there;
            if (is_there && command.what == STOP) progress.stopped = command.launch;
        }
    }
    __syncthreads();
    if (command.what == COMPUTE && command.asked.ids && command.call.n_tokens == 1 &&
        command.call.top_k <= COMMAND_PAIRS) {
        read_pairs(command);
    } else if (command.what == COMPUTE && command.asked.ids) {
        admit_pairs(command.asked, command.admitted, threadIdx.x, BLOCK);
        __syncthreads();
        fence_device();
    }
    write_letter(&rooms->letter, progress.round, command);
}

// --- every block's ------------------------------------------------------------------------

DEVICE void follow(Rooms* rooms, const Progress& progress, Command& command) {
    if (threadIdx.x < 32) {
        do wait_for_block();
        while (!look_for(&rooms->letter, progress.round, command));
        // Pairs were written before, and activations that are read where they are.
        if (command.asked.ids || command.admitted.n_values == 0) fence_device();
    }
    __syncthreads();
}

// Activations, by as many blocks as have something to do; false if they are not brought.
DEVICE bool bring_x(const Command& command, Rooms* rooms, u32 round) {
    // Two quads of each thread.
    const long long n = (command.admitted.n_values + BLOCK * 8 - 1) / (BLOCK * 8);
    const int n_blocks = n < (int)gridDim.x ? (int)n : (int)gridDim.x;
    if ((int)blockIdx.x >= n_blocks) return n_blocks > 0;
    admit_rows(command.asked, command.admitted, blockIdx.x * BLOCK + threadIdx.x, n_blocks * BLOCK);
    __syncthreads();
    if (threadIdx.x != 0) return true;
    fence_device();
    if (n_blocks > 1) {
        if (atomicAdd(&rooms->n_x, 1u) + 1 != (u32)n_blocks) return true;
        rooms->n_x = 0;
        fence_device();
    }
    *(volatile u32*)&rooms->x = round;
    return true;
}

// As group_one_token, of what the command has.
DEVICE void group_command(Command& command, Groups& groups) {
    const int pair = threadIdx.x;
    if (pair < 32) {
        const int slot = pair < command.call.top_k ? command.slot[pair] : -1;
        const Lanes all = BALLOT(slot >= 0);
        if (pair < command.call.top_k) groups.id[pair] = (short)slot;
        if (slot >= 0) {
            const int before = count_lanes(all & ((1u << pair) - 1));
            groups.expert[before] = command.expert[pair];
            groups.pairs[before] = (short)pair;
            groups.begin[before + 1] = before + 1;
        }
        if (pair == 0) {
            groups.begin[0] = 0;
            groups.n_active = count_lanes(all);
            command.call.weights = command.weight;
        }
    }
    __syncthreads();
}

APART void compute(Command& command, Groups& groups, void* scratch, Rooms* rooms,
                   const Progress& progress) {
    const bool is_brought = bring_x(command, rooms, progress.round);
    if (command.asked.ids)
        group_pairs(command.call, groups);
    else
        group_command(command, groups);
    Lane lane = this_lane();
    const int team = lane.warp / GATE_UP_WARPS;
    lane.warp %= GATE_UP_WARPS;
    const auto sync = [&] { sync_team(team + 1, TEAM); };
    gate_up(command.call, groups, lane, team * gridDim.x + blockIdx.x, TEAMS * gridDim.x,
            ((GateUpSums*)scratch)[team], sync, [&] {
                if (is_brought && lane.warp == 0 && lane.index == 0)
                    await_count(&rooms->x, progress.round);
                sync();
            });
    count_block(&rooms->n_inner);
    down(command.call, groups, (float*)scratch, [&] {
        if (threadIdx.x == 0) await_count(&rooms->n_inner, (progress.n_computed + 1) * gridDim.x);
        __syncthreads();
    });
}

// The round is over for this block; the leader waits for all, as the next command may change what
// this one's blocks still read.
DEVICE void finish(const Command& command, const Resident& resident, Progress& progress) {
    Rooms* rooms = resident.rooms;
    const u32 all = progress.round * gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        // The output may be in the host's memory.
        fence_system();
        if (atomicAdd(&rooms->n_finished, 1u) + 1 == all && command.what == COMPUTE) {
            fence_system();
            if (command.done) *(volatile u32*)command.done = command.done_value;
            *(volatile u32*)&resident.mailbox->finished = command.number;
        }
        if (blockIdx.x == 0) await_count(&rooms->n_finished, all);
        progress.n_computed += command.what == COMPUTE;
        ++progress.round;
    }
    __syncthreads();
}

// When all blocks are through.
DEVICE void say_ended(const Resident& resident, const Progress& progress) {
    if (threadIdx.x != 0) return;
    Rooms* rooms = resident.rooms;
    rooms->next = progress.next;
    rooms->round = progress.round;
    rooms->n_computed = progress.n_computed;
    rooms->stopped = progress.stopped;
    fence_system();
    *(volatile u32*)&resident.mailbox->ended = resident.launch;
}

// Dynamic shared memory: GateUpSums of each team, later the float32 [DOWN_SPLIT, n_pairs, DOWN_ROWS]
// of decode_down.
extern "C" __global__ void __launch_bounds__(BLOCK, 1) resident(Resident resident, Route) {
    __shared__ Groups groups;
    __shared__ Command command;
    __shared__ Progress progress;
    DYNAMIC_SHARED(float, scratch);
    Rooms* rooms = resident.rooms;
    if (has_reached(rooms->stopped, resident.launch)) {
        if (blockIdx.x == 0 && threadIdx.x == 0)
            *(volatile u32*)&resident.mailbox->ended = resident.launch;
        return;
    }
    if (threadIdx.x == 0)
        progress = Progress{rooms->next, rooms->round, rooms->n_computed, rooms->stopped};
    __syncthreads();
    do {
        if (blockIdx.x == 0)
            lead(resident, progress, command);
        else
            follow(rooms, progress, command);
        if (command.what == COMPUTE) compute(command, groups, scratch, rooms, progress);
        finish(command, resident, progress);
    } while (command.what == COMPUTE);
    if (blockIdx.x == 0) say_ended(resident, progress);
}

#endif
