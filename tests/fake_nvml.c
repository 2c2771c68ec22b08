/* A stand-in for libnvidia-ml.so.1 with two GPUs, for tests: the driver's interface as nvidia-ml-py calls it.
 *
 * FAKE_NVML_LOST_AFTER=n: questions about GPU 1 fail from the n-th on, as of a GPU that fell off the bus.
 * FAKE_NVML_NO_POWER=1: no GPU knows its power or what throttles it. FAKE_NVML_INIT=n: nvmlInit answers n.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, GPU_IS_LOST = 15 };

typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { unsigned long long total, free, used; } Memory;

static int started, asked;
static char gpus[2];

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int state_of(void *gpu) {
    if (!started) return UNINITIALIZED;
    if (gpu == &gpus[1] && ++asked > number("FAKE_NVML_LOST_AFTER", 1 << 30)) return GPU_IS_LOST;
    return gpu == &gpus[0] || gpu == &gpus[1] ? OK : INVALID_ARGUMENT;
}

const char *nvmlErrorString(int status) { return status == GPU_IS_LOST ? "GPU is lost" : "an error"; }

int nvmlInitWithFlags(unsigned int flags) {
    int status = number("FAKE_NVML_INIT", OK);
    started = status == OK;
    return status;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    int status = started ? OK : UNINITIALIZED;
    started = 0;
    return status;
}

int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    if (!started) return UNINITIALIZED;
    snprintf(version, length, "580.95.05");
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = 2;
    return started ? OK : UNINITIALIZED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **gpu) {
    if (index > 1) return INVALID_ARGUMENT;
    *gpu = &gpus[index];
    return started ? OK : UNINITIALIZED;
}

int nvmlDeviceGetName(void *gpu, char *name, unsigned int length) {
    if (!started) return UNINITIALIZED;
    snprintf(name, length, "NVIDIA Stand-in %d", (int)((char *)gpu - gpus));
    return OK;
}

int nvmlDeviceGetUtilizationRates(void *gpu, Utilization *rates) {
    int status = state_of(gpu);
    if (status == OK) *rates = (Utilization){40 + (unsigned int)((char *)gpu - gpus), 7};
    return status;
}

int nvmlDeviceGetMemoryInfo(void *gpu, Memory *memory) {
    int status = state_of(gpu);
    if (status == OK) *memory = (Memory){150ull << 30, 100ull << 30, 50ull << 30};
    return status;
}

int nvmlDeviceGetTemperature(void *gpu, int sensor, unsigned int *celsius) {
    int status = state_of(gpu);
    if (status == OK) *celsius = 36;
    return status;
}

int nvmlDeviceGetPowerUsage(void *gpu, unsigned int *milliwatts) {
    int status = number("FAKE_NVML_NO_POWER", 0) ? NOT_SUPPORTED : state_of(gpu);
    if (status == OK) *milliwatts = 123456;
    return status;
}

int nvmlDeviceGetClockInfo(void *gpu, int type, unsigned int *mhz) {
    int status = state_of(gpu);
    if (status == OK) *mhz = type == 1 ? 1980 : 0;
    return status;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, unsigned long long *reasons) {
    int status = number("FAKE_NVML_NO_POWER", 0) ? NOT_SUPPORTED : state_of(gpu);
    if (status == OK) *reasons = 0x4 | 0x40;
    return status;
}
