"""Which operators each file declares, by `python -m infera_gpu.ops`: a line is a file and names."""

INDEX = """\
activation Celu Clip Elu Gelu HardSigmoid HardSwish LeakyRelu Mish PRelu Relu Selu Shrink Sigmoid Softplus
activation Softsign SwiGLU Swish Tanh ThresholdedRelu infera.Gelu
attention Attention RotaryEmbedding TensorScatter ai.onnx.preview.FlexAttention
batchnorm BatchNormalization infera.TrainingBatchNormalization
cast BitCast Cast CastLike
chain infera.Elementwise
channels_last infera.AveragePoolNHWC infera.BatchNormalizationNHWC infera.FusedConvNHWC
channels_last infera.GlobalAveragePoolNHWC infera.GlobalMaxPoolNHWC infera.MaxPoolNHWC
channels_last_rest infera.ConvTransposeNHWC infera.LRNNHWC
compare And BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Equal Greater GreaterOrEqual IsInf IsNaN
compare Less LessOrEqual Not Or Where Xor
control Loop Scan SequenceMap
conv Conv ConvInteger com.microsoft.FusedConv infera.FusedConv
conv_transpose ConvTranspose
dropout Dropout infera.TrainingDropout
einsum Einsum
elementwise Abs Acos Acosh Add Asin Asinh Atan Atanh Ceil Cos Cosh Div Erf Exp Floor Log Max Mean Min Mod Mul
elementwise Neg Pow Reciprocal Round Sign Sin Sinh Sqrt Sub Sum Tan
fused_attention infera.Attention
fused_embed infera.EmbeddedNormalization
fused_lookup infera.Lookup
fused_norm infera.AxisNormalization infera.L2Normalization infera.WidenedNormalization
fused_rotary infera.Rotary
gated infera.GatedMatMul
generate Constant ConstantOfShape EyeLike Range
gradient infera.OnesLike infera.SumTo
image ImageDecoder
indexing Gather GatherElements GatherND OneHot
legacy Add And BatchNormalization Div Equal Gemm Greater Less Mul Or PRelu Pow Sub Xor
linear_attention CausalConvWithState LinearAttention
loss NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss
matmul Det Gemm MatMul infera.FusedMatMul
ml ai.onnx.ml.ArrayFeatureExtractor ai.onnx.ml.Binarizer ai.onnx.ml.CategoryMapper
ml ai.onnx.ml.FeatureVectorizer ai.onnx.ml.Imputer ai.onnx.ml.LabelEncoder ai.onnx.ml.Normalizer
ml ai.onnx.ml.OneHotEncoder ai.onnx.ml.Scaler
ml_maps ai.onnx.ml.CastMap ai.onnx.ml.DictVectorizer ai.onnx.ml.ZipMap
ml_models ai.onnx.ml.LinearClassifier ai.onnx.ml.LinearRegressor
ml_svm ai.onnx.ml.SVMClassifier ai.onnx.ml.SVMRegressor
ml_trees ai.onnx.ml.TreeEnsemble ai.onnx.ml.TreeEnsembleClassifier ai.onnx.ml.TreeEnsembleRegressor
ms SimplifiedLayerNormalization com.microsoft.BiasGelu com.microsoft.EmbedLayerNormalization
ms com.microsoft.FastGelu com.microsoft.Gelu com.microsoft.QuickGelu
ms com.microsoft.SkipLayerNormalization com.microsoft.SkipSimplifiedLayerNormalization
ms_attention com.microsoft.Attention com.microsoft.MultiHeadAttention com.microsoft.RotaryEmbedding
ms_diffusion com.microsoft.BiasAdd com.microsoft.BiasSplitGelu com.microsoft.GroupNorm com.microsoft.NhwcConv
ms_diffusion com.microsoft.SkipGroupNorm
ms_gated com.microsoft.GatedAdd com.microsoft.GatedRMSNorm com.microsoft.LinearAttentionGate
ms_gated com.microsoft.ScaledSiLU
ms_grouped com.microsoft.GroupQueryAttention
ms_matmul com.microsoft.FusedGemm com.microsoft.FusedMatMul com.microsoft.TransposeMatMul
ms_moe com.microsoft.MoE com.microsoft.QMoE
ms_nbits com.microsoft.GatherBlockQuantized com.microsoft.MatMulBnb4 com.microsoft.MatMulNBits
ms_nbits infera.FusedMatMulNBits
ms_quant com.microsoft.QLinearAdd com.microsoft.QLinearAveragePool com.microsoft.QLinearConcat
ms_quant com.microsoft.QLinearGlobalAveragePool com.microsoft.QLinearLeakyRelu com.microsoft.QLinearMul
ms_quant com.microsoft.QLinearSigmoid com.microsoft.QLinearSoftmax com.microsoft.QLinearWhere
ms_quant_attention com.microsoft.QAttention
ms_quant_matmul com.microsoft.DynamicQuantizeMatMul com.microsoft.MatMulIntegerToFloat com.microsoft.QGemm
ms_quant_norm com.microsoft.QEmbedLayerNormalization
ms_recurrent com.microsoft.DynamicQuantizeLSTM
ms_rotary com.microsoft.MRotaryEmbedding
ms_standard com.microsoft.CDist com.microsoft.CausalConvWithState com.microsoft.ExpandDims
ms_standard com.microsoft.GatherND com.microsoft.GridSample com.microsoft.Inverse com.microsoft.LinearAttention
ms_standard com.microsoft.Pad com.microsoft.Range com.microsoft.Trilu com.microsoft.UnfoldTensor
ms_standard com.microsoft.Unique
ms_windows com.microsoft.NhwcMaxPool com.microsoft.QLinearConv
norm GroupNormalization InstanceNormalization LRN LayerNormalization LpNormalization
norm MeanVarianceNormalization RMSNormalization
normalized infera.NormalizedMatMul
pad Pad
pool AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool
quant DequantizeLinear DynamicQuantizeLinear QuantizeLinear com.microsoft.DequantizeLinear
quant com.microsoft.QuantizeLinear
quant_conv QLinearConv
quant_matmul MatMulInteger QLinearMatMul
quant_narrow infera.Centre infera.DynamicCentre infera.NarrowMatMul
quantized infera.QuantizedConv infera.QuantizedConvNHWC infera.QuantizedMatMul
quantized_norm infera.QuantizedLayerNormalization
random Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike
rearrange DepthToSpace ReverseSequence SpaceToDepth Trilu
recurrent GRU LSTM RNN
reduce ArgMax ArgMin CumProd CumSum ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean
reduce ReduceMin ReduceProd ReduceSum ReduceSumSquare TopK
regions MaxRoiPool RoiAlign
reordered infera.FlattenStored infera.ReshapeStored
resize Resize Upsample
sample AffineGrid CenterCropPad Col2Im DeformConv GridSample MaxUnpool
scatter Scatter ScatterElements ScatterND
select Compress NonMaxSuppression NonZero Unique
sequence ConcatFromSequence Optional OptionalGetElement OptionalHasElement SequenceAt SequenceConstruct
sequence SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence
shape Expand Flatten Identity Reshape Shape Size Squeeze Transpose Unsqueeze
signal BlackmanWindow DFT HammingWindow HannWindow MelWeightMatrix STFT
slicing Concat Slice Split Tile
softmax Hardmax LogSoftmax Softmax
text RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer
training ai.onnx.preview.training.Adagrad ai.onnx.preview.training.Adam ai.onnx.preview.training.Momentum
window
"""
