/* A libcuda.so.1 that records launches: as much of the driver as CuPy asks for to load a cubin and to launch it.
   Types are those of cuda.h as far as their size goes. No GPU, one thread. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };
enum { KERNELS = 16, PARAMETERS = 64, LAUNCHES = 16, BYTES = 1024 };

static struct kernel {
    char name[256];
    int count, sizes[PARAMETERS];
    int attribute, value; /* the last that was set */
} kernels[KERNELS];
static int known, failure;

struct launch {
    int kernel, bytes;
    uint32_t grid[3], block[3], shared;
    uint64_t stream, extra;
    int attribute, value; /* of the launch, 0 where there is none */
    unsigned char parameters[BYTES]; /* one behind the other */
};
static struct launch launches[LAUNCHES];
static int launched;

/* For the test. */

/* A kernel of this name takes parameters of so many bytes each. Returns its number, from 0 on. */
int fakecuda_kernel(const char *name, int count, const int *sizes) {
    struct kernel *k = &kernels[known];
    if (known == KERNELS || count > PARAMETERS || strlen(name) >= sizeof k->name) return -1;
    strcpy(k->name, name);
    memcpy(k->sizes, sizes, count * sizeof *sizes);
    k->count = count;
    return known++;
}

int fakecuda_launches(void) { return launched; }
const struct launch *fakecuda_launch(int i) { return &launches[i]; }
int fakecuda_attribute(int kernel) { return kernels[kernel].attribute; }
int fakecuda_value(int kernel) { return kernels[kernel].value; }

/* Every launch from now on fails with this error; 0 for none. */
void fakecuda_fail(int error) { failure = error; }

/* The driver. */

static uint64_t number(const unsigned char *at, int bytes) {
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
}

/* Where an ELF image ends: behind its table of sections or of segments. */
static const unsigned char *end_of(const unsigned char *image) {
    uint64_t segments = number(image + 32, 8) + number(image + 54, 2) * number(image + 56, 2);
    uint64_t sections = number(image + 40, 8) + number(image + 58, 2) * number(image + 60, 2);
    return image + (segments > sections ? segments : sections);
}

int cuModuleLoadData(void **module, const void *image) {
    if (memcmp(image, "\177ELF", 4)) return INVALID_IMAGE;
    *module = (void *)image;
    return 0;
}

int cuModuleUnload(void *module) { return 0; }

int cuModuleGetFunction(void **function, void *module, const char *name) {
    const unsigned char *image = module, *end = end_of(image);
    size_t length = strlen(name) + 1;
    for (; image + length <= end; image++)
        if (!memcmp(image, name, length))
            for (int i = 0; i < known; i++)
                if (!strcmp(kernels[i].name, name)) {
                    *function = &kernels[i];
                    return 0;
                }
    return NOT_FOUND;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    struct kernel *k = function;
    k->attribute = attribute, k->value = value;
    return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = 0;
    return 0;
}

int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    const struct kernel *k = function;
    struct launch *made = &launches[launched];
    if (failure) return failure;
    if (launched == LAUNCHES) return INVALID_VALUE;
    *made = (struct launch){.kernel = k - kernels,
                            .grid = {gx, gy, gz},
                            .block = {bx, by, bz},
                            .shared = shared,
                            .stream = (uintptr_t)stream,
                            .extra = (uintptr_t)extra};
    for (int i = 0; i < k->count; i++) {
        if (made->bytes + k->sizes[i] > BYTES) return INVALID_VALUE;
        memcpy(made->parameters + made->bytes, parameters[i], k->sizes[i]);
        made->bytes += k->sizes[i];
    }
    launched++;
    return 0;
}

struct attribute {
    int id;
    char padding[4];
    union {
        char room[64];
        int value;
    };
};
struct config {
    unsigned grid[3], block[3], shared;
    void *stream;
    struct attribute *attributes;
    unsigned count;
};

int cuLaunchKernelEx(const struct config *c, void *function, void **parameters, void **extra) {
    const unsigned *g = c->grid, *b = c->block;
    int failed = cuLaunchKernel(function, g[0], g[1], g[2], b[0], b[1], b[2], c->shared, c->stream, parameters, extra);
    if (failed) return failed;
    if (c->count != 1) return INVALID_VALUE;
    launches[launched - 1].attribute = c->attributes->id, launches[launched - 1].value = c->attributes->value;
    return 0;
}

int cuGetErrorName(int error, const char **name) {
    *name = "CUDA_ERROR_OF_THE_FAKE";
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = "an error of the fake driver";
    return 0;
}
