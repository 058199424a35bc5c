#ifndef NNET_GATHER_H_
#define NNET_GATHER_H_

#include "hls_stream.h"
#include "nnet_common.h"

namespace nnet {

// A layer's own has `place`, of each value of the result: which value of the source stands there, or -1 for `fill`.
// Between streams, `pack` says in which of the source's packs, and `place` where in it.
struct gather_config {
    static const unsigned n_in = 10;
    static const unsigned n_out = 10;
    static const long long fill = 0;
};

template <class value_T, typename CONFIG_T> value_T gather_fill() {
    #pragma HLS INLINE
    value_T value = 0;
    value.range() = (long long)CONFIG_T::fill;
    return value;
}

template <class data_T, class res_T, typename CONFIG_T>
void gather(data_T data[CONFIG_T::n_in], res_T res[CONFIG_T::n_out]) {
    #pragma HLS PIPELINE

GatherLoop:
    for (unsigned i = 0; i < CONFIG_T::n_out; i++) {
        #pragma HLS UNROLL
        const int place = CONFIG_T::place(i);
        if (place < 0) {
            res[i] = gather_fill<res_T, CONFIG_T>();
        } else {
            res[i] = data[place];
        }
    }
}

template <class data_T, class res_T, typename CONFIG_T>
void gather(hls::stream<data_T> &data, hls::stream<res_T> &res) {
    typename data_T::value_type values[CONFIG_T::n_in / data_T::size][data_T::size];
    #pragma HLS ARRAY_PARTITION variable=values complete dim=2

GatherRead:
    for (unsigned i = 0; i < CONFIG_T::n_in / data_T::size; i++) {
        #pragma HLS PIPELINE

        data_T in_data = data.read();

    GatherUnpack:
        for (unsigned j = 0; j < data_T::size; j++) {
            #pragma HLS UNROLL
            values[i][j] = in_data[j];
        }
    }

GatherWrite:
    for (unsigned i = 0; i < CONFIG_T::n_out / res_T::size; i++) {
        #pragma HLS PIPELINE

        res_T out_data;
        PRAGMA_DATA_PACK(out_data)

    GatherPack:
        for (unsigned j = 0; j < res_T::size; j++) {
            #pragma HLS UNROLL
            const int place = CONFIG_T::place(i * res_T::size + j);
            if (place < 0) {
                out_data[j] = gather_fill<typename res_T::value_type, CONFIG_T>();
            } else {
                out_data[j] = values[CONFIG_T::pack(i * res_T::size + j)][place];
            }
        }

        res.write(out_data);
    }
}

} // namespace nnet

#endif
