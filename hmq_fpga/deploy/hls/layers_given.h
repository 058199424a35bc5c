#ifndef LAYERS_GIVEN_H_
#define LAYERS_GIVEN_H_

#include <cstddef>
#include <map>
#include <string>

#include "hls_stream.h"

// In a copy of a project that is simulated: values that take a tensor's place, once it was saved.
namespace given {

static std::map<std::string, const double *> values;

template <class data_T> void put(data_T *data, const char *name, size_t size) {
    auto found = values.find(name);
    if (found == values.end())
        return;
    for (size_t i = 0; i < size; i++)
        data[i] = data_T(found->second[i]);
}

template <class data_T> void put(hls::stream<data_T> &data, const char *name, size_t size) {
    auto found = values.find(name);
    if (found == values.end())
        return;
    for (size_t i = 0; i < size / data_T::size; i++) {
        data_T pack = data.read();
        for (size_t j = 0; j < data_T::size; j++)
            pack[j] = typename data_T::value_type(found->second[i * data_T::size + j]);
        data.write(pack);
    }
}

} // namespace given

// Give one sample of a tensor, or none for a null pointer.
extern "C" void give(const char *name, const double *from) {
    if (from)
        given::values[name] = from;
    else
        given::values.erase(name);
}

#endif
