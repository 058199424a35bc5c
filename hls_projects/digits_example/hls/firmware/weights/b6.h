//Numpy array shape [10]
//Min -0.316406250000
//Max 0.406250000000
//Number of zeros 0

#ifndef B6_H_
#define B6_H_

#ifndef __SYNTHESIS__
linear_4_bias_t b6[10];
#else
linear_4_bias_t b6[10] = {0.27734375, 0.08984375, -0.23046875, -0.31640625, -0.07812500, -0.30078125, 0.39453125, -0.05078125, 0.33593750, 0.40625000};

#endif

#endif
