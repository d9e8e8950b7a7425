// The CPU kernels exist once per instruction set; this picks the widest one that the processor has.
#pragma once
#include <cstdlib>
#include <string>

#include "hyperfast/activation_boundary.h"
#include "hyperfast/attention_transfer.h"
#include "hyperfast/channel_wise_distillation.h"
#include "hyperfast/cross_entropy_distillation.h"
#include "hyperfast/fitnets.h"
#include "hyperfast/flow_of_solution.h"
#include "hyperfast/gated_experts.h"
#include "hyperfast/generate.h"
#include "hyperfast/gram.h"
#include "hyperfast/greedy_chain.h"
#include "hyperfast/predict.h"
#include "hyperfast/ranger_update.h"
#include "hyperfast/rank_one_update.h"
#include "hyperfast/relational_distance_angle.h"
#include "hyperfast/similarity_preserving.h"
#include "hyperfast/sub_logit_distillation.h"
#include "hyperfast/unit_distance.h"

namespace hyperfast {

struct CpuKernels {
  const char* instruction_set;
  void (*generate_forward)(const GenerateParams&, int threads);
  void (*generate_backward)(const GenerateParams&, int threads);
  void (*attention_transfer_forward)(const AttentionParams&, int threads);
  void (*attention_transfer_backward)(const AttentionParams&, int threads);
  bool (*cross_entropy_distillation_forward)(const LogitParams&, int threads);  // false: a label is none of the classes
  void (*cross_entropy_distillation_backward)(const LogitParams&, int threads);
  void (*greedy_chain)(const GreedyChainParams&, int threads);
  bool (*predict)(const PredictParams&, int threads);  // false: an index is outside its table
  void (*rank_one_update)(const RankOneParams&, int threads);
  void (*ranger_update)(const RangerParams&, int threads);
  void (*gram_backward)(const GramGradientParams&, int threads);
  void (*similarity_preserving)(const SimilarityParams&, int threads);
  void (*relational_distance_angle)(const RelationalParams&, int threads);
  void (*flow_of_solution)(const FlowParams&, int threads);
  void (*gated_experts)(const GatedExpertsParams&, int threads);
  void (*activation_boundary)(const ActivationBoundaryParams&, int threads);
  void (*channel_wise_distillation)(const ChannelWiseDistillationParams&, int threads);
  void (*fitnets)(const FitNetsParams&, int threads);
  bool (*sub_logit_distillation)(const SubLogitParams&, int threads);  // false: a label is none of the classes
  void (*unit_distance)(const UnitDistanceParams&, int threads);
};

#define HYPERFAST_DECLARE(isa)                                               \
  namespace isa {                                                            \
  void generate_forward(const GenerateParams&, int);                         \
  void generate_backward(const GenerateParams&, int);                        \
  void attention_transfer_forward(const AttentionParams&, int);              \
  void attention_transfer_backward(const AttentionParams&, int);             \
  bool cross_entropy_distillation_forward(const LogitParams&, int);          \
  void cross_entropy_distillation_backward(const LogitParams&, int);         \
  void greedy_chain(const GreedyChainParams&, int);                          \
  bool predict(const PredictParams&, int);                                   \
  void rank_one_update(const RankOneParams&, int);                           \
  void ranger_update(const RangerParams&, int);                              \
  void gram_backward(const GramGradientParams&, int);                        \
  void similarity_preserving(const SimilarityParams&, int);                  \
  void relational_distance_angle(const RelationalParams&, int);              \
  void flow_of_solution(const FlowParams&, int);                             \
  void gated_experts(const GatedExpertsParams&, int);                        \
  void activation_boundary(const ActivationBoundaryParams&, int);            \
  void channel_wise_distillation(const ChannelWiseDistillationParams&, int); \
  void fitnets(const FitNetsParams&, int);                                   \
  bool sub_logit_distillation(const SubLogitParams&, int);                   \
  void unit_distance(const UnitDistanceParams&, int);                        \
  inline CpuKernels kernels() {                                              \
    return {#isa,                                                            \
            generate_forward,                                                \
            generate_backward,                                               \
            attention_transfer_forward,                                      \
            attention_transfer_backward,                                     \
            cross_entropy_distillation_forward,                              \
            cross_entropy_distillation_backward,                             \
            greedy_chain,                                                    \
            predict,                                                         \
            rank_one_update,                                                 \
            ranger_update,                                                   \
            gram_backward,                                                   \
            similarity_preserving,                                           \
            relational_distance_angle,                                       \
            flow_of_solution,                                                \
            gated_experts,                                                   \
            activation_boundary,                                             \
            channel_wise_distillation,                                       \
            fitnets,                                                         \
            sub_logit_distillation,                                          \
            unit_distance};                                                  \
  }                                                                          \
  }

HYPERFAST_DECLARE(baseline)
#if defined(__x86_64__)
HYPERFAST_DECLARE(avx2)
HYPERFAST_DECLARE(avx512)
HYPERFAST_DECLARE(avx512bf16)
#endif
#undef HYPERFAST_DECLARE

// HYPERFAST_INSTRUCTION_SET narrows the choice, so that one machine can test them all.
inline CpuKernels choose_cpu_kernels() {
  const char* wanted = std::getenv("HYPERFAST_INSTRUCTION_SET");
  const std::string limit = wanted ? wanted : "avx512bf16";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (limit == "avx512bf16" && wide && __builtin_cpu_supports("avx512bf16")) return avx512bf16::kernels();
  if (limit.rfind("avx512", 0) == 0 && wide) return avx512::kernels();
  if (limit != "baseline" && fma) return avx2::kernels();
#endif
  return baseline::kernels();
}

inline const CpuKernels& cpu_kernels() {
  static const CpuKernels chosen = choose_cpu_kernels();
  return chosen;
}

}  // namespace hyperfast
