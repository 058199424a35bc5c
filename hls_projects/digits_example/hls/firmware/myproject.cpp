#include <iostream>

#include "myproject.h"
#include "parameters.h"


void myproject(
    input_t input_values[64],
    result_t layer9_out[10]
) {

    // hls-fpga-machine-learning insert IO
    #pragma HLS ARRAY_RESHAPE variable=input_values complete dim=0
    #pragma HLS ARRAY_PARTITION variable=layer9_out complete dim=0
    #pragma HLS INTERFACE ap_vld port=input_values,layer9_out 
    #pragma HLS PIPELINE

    // hls-fpga-machine-learning insert load weights
#ifndef __SYNTHESIS__
    static bool loaded_weights = false;
    if (!loaded_weights) {
        nnet::load_weights_from_txt<linear_0_weight_t, 1024>(w3, "w3.txt");
        nnet::load_weights_from_txt<linear_0_bias_t, 16>(b3, "b3.txt");
        nnet::load_weights_from_txt<linear_2_weight_t, 256>(w6, "w6.txt");
        nnet::load_weights_from_txt<linear_2_bias_t, 16>(b6, "b6.txt");
        nnet::load_weights_from_txt<linear_4_weight_t, 160>(w9, "w9.txt");
        nnet::load_weights_from_txt<linear_4_bias_t, 10>(b9, "b9.txt");
        loaded_weights = true;    }
#endif
    // ****************************************
    // NETWORK INSTANTIATION
    // ****************************************

    // hls-fpga-machine-learning insert layers

    layer3_t layer3_out[16];
    #pragma HLS ARRAY_PARTITION variable=layer3_out complete dim=0

    layer5_t layer5_out[16];
    #pragma HLS ARRAY_PARTITION variable=layer5_out complete dim=0

    layer6_t layer6_out[16];
    #pragma HLS ARRAY_PARTITION variable=layer6_out complete dim=0

    layer8_t layer8_out[16];
    #pragma HLS ARRAY_PARTITION variable=layer8_out complete dim=0

    nnet::dense<input_t, layer3_t, config3>(input_values, layer3_out, w3, b3); // linear_0

    nnet::relu<layer3_t, layer5_t, relu_config5>(layer3_out, layer5_out); // relu_1

    nnet::dense<layer5_t, layer6_t, config6>(layer5_out, layer6_out, w6, b6); // linear_2

    nnet::relu<layer6_t, layer8_t, relu_config8>(layer6_out, layer8_out); // relu_3

    nnet::dense<layer8_t, result_t, config9>(layer8_out, layer9_out, w9, b9); // linear_4

}

