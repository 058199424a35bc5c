#ifndef DEFINES_H_
#define DEFINES_H_

#include "ap_fixed.h"
#include "ap_int.h"
#include "nnet_utils/nnet_types.h"
#include <array>
#include <cstddef>
#include <cstdio>
#include <tuple>
#include <tuple>


// hls-fpga-machine-learning insert numbers

// hls-fpga-machine-learning insert layer-precision
typedef ap_ufixed<8,0,AP_RND_CONV,AP_SAT,0> input_t;
typedef ap_fixed<15,6> linear_0_accum_t;
typedef ap_fixed<15,6> layer2_t;
typedef ap_fixed<3,2> linear_0_weight_t;
typedef ap_fixed<9,0> linear_0_bias_t;
typedef ap_uint<1> layer2_index;
typedef ap_ufixed<8,3,AP_RND_CONV,AP_SAT,0> layer3_t;
typedef ap_fixed<18,8> relu_1_table_t;
typedef ap_fixed<16,7> linear_2_accum_t;
typedef ap_fixed<16,7> layer4_t;
typedef ap_fixed<6,2> linear_2_weight_t;
typedef ap_fixed<10,1> linear_2_bias_t;
typedef ap_uint<1> layer4_index;
typedef ap_ufixed<8,5,AP_RND_CONV,AP_SAT,0> layer5_t;
typedef ap_fixed<18,8> relu_3_table_t;
typedef ap_fixed<17,9> linear_4_accum_t;
typedef ap_fixed<17,9> result_t;
typedef ap_fixed<7,2> linear_4_weight_t;
typedef ap_fixed<8,0> linear_4_bias_t;
typedef ap_uint<1> layer6_index;

// hls-fpga-machine-learning insert emulator-defines


#endif
