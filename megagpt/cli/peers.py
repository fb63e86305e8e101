"""What others call our settings: Megatron-LM, GPT-NeoX, DeepSpeed, Hugging Face's Trainer and configurations, nanoGPT.

Tables of their names, without hyphens in front, with hyphens for underscores; `*` stands for any letters. What takes
more than a table to translate is in translate.py. docs/configuration.md shows both.
Sources: Megatron-LM megatron/training/arguments.py and config/, core/transformer/transformer_config.py; GPT-NeoX
megatron/neox_arguments/; transformers TrainingArguments and PretrainedConfig; nanoGPT train.py.
"""

from __future__ import annotations

# The value stays as it is. Our key: what others call it.
SAME = {
    "model.n_layers": "num-layers n-layer num-hidden-layers encoder-num-layers decoder-num-layers",
    "model.d_model": "hidden-size n-embd encoder-hidden-size",
    "model.n_heads": "num-attention-heads n-head num-heads",
    "model.n_kv_heads": "num-query-groups num-kv-heads num-key-value-heads",
    "model.d_head": "kv-channels head-dim",
    "model.d_ff": "ffn-hidden-size n-inner",
    "model.seq_len": """
        seq-length block-size max-seq-length max-seq-len encoder-seq-length decoder-seq-length n-positions n-ctx""",
    "model.norm_eps": "norm-epsilon layernorm-epsilon rms-norm-epsilon rms-norm-eps layer-norm-epsilon layer-norm-eps",
    "model.rotary_base": "rotary-base rotary-emb-base rope-theta",
    "model.rotary_fraction": "rotary-percent rotary-pct partial-rotary-factor",
    "model.rotary_factor": "rotary-seq-len-interpolation-factor",
    "model.t5_buckets": "relative-attention-num-buckets rpe-num-buckets",
    "model.t5_max_distance": "relative-attention-max-distance rpe-max-distance",
    "model.init_std": "init-method-std initializer-range",
    "model.dropout_attention": "attention-dropout attn-pdrop",
    "model.dropout_embedding": "embd-pdrop",
    "model.dropout_residual": "resid-pdrop",
    "parallel.tp": "tensor-model-parallel-size model-parallel-size tensor-parallel-size tensor-parallel mp-size",
    "parallel.pp": """
        pipeline-model-parallel-size pipe-parallel-size pipeline-parallel-size pipeline-parallel
        transformer-pipeline-model-parallel-size""",
    "parallel.zero_stage": "zero zero-optimization.stage",
    "data.tokenizer_model": "tokenizer-name-or-path tokenizer-name tokenizer-path tokenizer-file",
    "optim.lr": "learning-rate optimizer.params.lr scheduler.params.warmup-max-lr",
    "optim.warmup_steps": """
        lr-warmup-iters lr-warmup-steps warmup-iters num-warmup-steps scheduler.params.warmup-num-steps""",
    "optim.decay_steps": "lr-decay-iters lr-decay-steps",
    "optim.warmup_from": "lr-warmup-init scheduler.params.warmup-min-lr",
    "optim.weight_decay": "wd optimizer.params.weight-decay",
    "optim.beta1": "adam-beta1 lion-beta1 muon-momentum",
    "optim.beta2": "adam-beta2 lion-beta2",
    "optim.eps": "adam-eps adam-epsilon optimizer.params.eps",
    "optim.clip": "clip-grad max-grad-norm grad-clip gradient-clipping gradient-clip-val",
    "optim.label_smoothing": "label-smoothing-factor",
    "train.train_steps": """
        train-iters max-steps max-iters max-train-steps num-steps total-steps scheduler.params.total-num-steps""",
    "train.micro_batch_size": "per-device-train-batch-size per-gpu-train-batch-size train-micro-batch-size-per-gpu",
    "train.global_batch_size": "train-batch-size",
    "train.seed": "data-seed",
    "checkpoint.save": "output-dir out-dir save-dir checkpoint-dir save-path",
    "checkpoint.save_interval": "save-steps checkpoint-factor checkpoint-interval save-iters persistent-save-interval",
    "checkpoint.keep_last": "save-total-limit keep-last-n-checkpoints most-recent-k",
    "checkpoint.keep_every": "save-retain-interval",
    "log.log_interval": "logging-steps steps-per-print log-every",
    "log.eval_interval": "eval-every val-interval",
    "log.eval_steps": "eval-iters val-iters",
    "faults.exit_after_minutes": "exit-duration-in-mins",
    "faults.progress_timeout_s": "ddp-timeout",
    "faults.skip_steps": "iterations-to-skip skip-train-iteration-range",
    "log.wandb_project": "wandb-project",
}

# A switch there. Its name: what it means here.
SWITCHES: dict[str, dict[str, str]] = {
    "bf16 bf16.enabled": {"train.precision": "bf16"},
    "fp16 fp16.enabled fp16.fp16": {"train.precision": "fp16"},
    "squared-relu": {"model.activation": "relu2"},
    "openai-gelu": {"model.activation": "gelu_tanh"},
    "disable-bias-linear no-add-bias-linear": {"model.bias_attention": "False", "model.bias_mlp": "False"},
    "untie-embeddings-and-output-weights no-weight-tying": {"model.tied_embeddings": "False"},
    "tie-word-embeddings": {"model.tied_embeddings": "True"},
    "use-rotary-position-embeddings": {"model.position": "rotary"},
    "rotary-interleaved": {"model.rotary_interleaved": "True"},
    "use-bias-in-attn-linear attention-bias": {"model.bias_attention": "True"},
    "use-bias-in-mlp mlp-bias": {"model.bias_mlp": "True"},
    "use-bias-in-norms": {"model.bias_norm": "True"},
    "bias": {"model.bias_attention": "True", "model.bias_mlp": "True", "model.bias_norm": "True"},
    "gpt-j-tied": {"model.block": "parallel"},
    "embed-layernorm embedding-layernorm": {"model.embedding_norm": "True"},
    "use-distributed-optimizer": {"parallel.zero_stage": "1"},
    "use-torch-fsdp2 use-megatron-fsdp use-custom-fsdp": {"parallel.zero_stage": "3"},
    "optimizer-cpu-offload cpu-optimizer cpu-offload": {"parallel.offload_optimizer": "True"},
    "gradient-checkpointing activation-checkpointing": {"parallel.recompute": "True"},
    "checkpoint-activations deepspeed-activation-checkpointing": {"parallel.recompute": "True"},
    "load-best-model-at-end": {"checkpoint.keep_best": "True"},
    "log-gradient-noise-scale": {"log.noise_scale": "True"},
    "detect-anomaly": {"debug.detect_nan": "True"},
}

# One of several words there. Names: our key, and what it is here; a word without a counterpart is not in it.
CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "glu-activation": ("model.activation", {"swiglu": "swiglu", "geglu": "geglu"}),
    "zero-optimization.offload-optimizer.device": (
        "parallel.offload_optimizer", {"cpu": "True", "none": "False"},
    ),
    "position-embedding-type pos-emb position-embedding": (
        "model.position",
        {"learned_absolute": "learned", "learned": "learned", "absolute": "learned", "rope": "rotary",
         "rotary": "rotary", "relative": "t5", "rpe": "t5", "alibi": "alibi", "sinusoidal": "sinusoidal",
         "none": "none"},
    ),
    "normalization norm": (
        "model.norm",
        {"layernorm": "layernorm", "rmsnorm": "rmsnorm", "te_layernorm": "layernorm", "te_rmsnorm": "rmsnorm"},
    ),
    "hidden-act activation-function hidden-activation": (
        "model.activation",
        {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
         "relu": "relu", "relu2": "relu2", "silu": "swiglu"},
    ),
    "optim optimizer-type optimizer.type": (
        "optim.optimizer",
        {"adam": "adamw", "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
         "adamw_apex_fused": "adamw", "fusedadam": "adamw", "adafactor": "adafactor", "lion": "lion",
         "lion_32bit": "lion", "muon": "muon"},
    ),
    "dtype torch-dtype params-dtype precision": (
        "train.precision",
        {"bfloat16": "bf16", "bf16": "bf16", "float16": "fp16", "fp16": "fp16", "half": "fp16", "float32": "fp32",
         "fp32": "fp32"},
    ),
    "data-parallel-sharding-strategy": (
        "parallel.zero_stage",
        {"no_shard": "0", "optim": "1", "optim_grads": "2", "optim_grads_params": "3"},
    ),
    "fsdp": ("parallel.zero_stage", {"full_shard": "3", "full_shard auto_wrap": "3", "shard_grad_op": "2",
                                     "no_shard": "0"}),
    "pipe-partition-method": (
        "parallel.partition",
        {"parameters": "parameters", "uniform": "uniform", "type:transformer": "uniform",
         "type:transformer|mlp": "uniform"},
    ),
    "attention-backend attn-implementation": (
        "train.kernels",
        {"auto": "auto", "flash": "auto", "fused": "auto", "flash_attention_2": "auto",
         "unfused": "auto,attention=softmax", "local": "auto,attention=softmax", "eager": "auto,attention=softmax",
         "sdpa": "auto,attention=sdpa", "flex_attention": "auto,attention=flex"},
    ),
}  # fmt: skip

# Said by nothing here, since it is always so. Why: names.
BY_ITSELF = {
    "kernels are fused where they are built; --kernels names others": """
        use-flash-attn use-flash-attn-* flash-attn* use-liger-kernel no-masked-softmax-fusion
        no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion no-persist-layer-norm
        no-gradient-accumulation-fusion gradient-accumulation-fusion masked-softmax-fusion bias-gelu-fusion
        bias-dropout-fusion rope-fusion
        layernorm-fusion rmsnorm-fusion scaled-upper-triang-masked-softmax-fusion scaled-masked-softmax-fusion
        cross-entropy-loss-fusion cross-entropy-fusion-impl apply-rope-fusion disable-jit-fuser no-fused-kernel
        use-fused-* use-flashattn-swiglu abort-on-unmet-fused-kernel-constraints""",
    "softmax and loss are computed in float32 anyway": """
        attention-softmax-in-fp32 no-attention-softmax-in-fp32 apply-query-key-layer-scaling
        fp16-lm-cross-entropy no-query-key-layer-scaling""",
    "gradients are added up and sent in float32 in bf16": """
        accumulate-allreduce-grads-in-fp32 grad-reduce-in-fp32 grad-reduce-in-bf16 fp32-allreduce data-types*""",
    "the vocabulary is padded by itself": "make-vocab-size-divisible-by padded-vocab-size pad-vocab-size*",
    "--n-kv-heads alone says it": "group-query-attention multi-query-attention",
    "the context is --seq-len": "max-position-embeddings",
    "one norm with another way to store its weights": "apply-layernorm-1p layernorm-zero-centered-gamma",
    "datasets are memory-mapped, read in one order, and indexed where that is needed": """
        data-impl mmap-warmup num-workers dataloader-num-workers dataloader-pin-memory dataloader-type
        no-mmap-bin-files mmap-bin-files data-cache-path num-dataset-builder-threads dataloader-*
        no-create-attention-mask-in-dataloader create-attention-mask-in-dataloader mid-level-dataset-surplus
        use-shared-fs""",
    "a run folder has TensorBoard, metrics.jsonl, and the loss curve": """
        tensorboard-dir log-dir logging-dir tensorboard-queue-size tensorboard-log-interval log-*-to-tensorboard
        log-throughput log-progress timing-log-level timing-log-option wall-clock-breakdown logging-strategy
        logging-first-step report-to disable-tqdm""",
    "checkpoints have one format, which every layout reads": """
        ckpt-format auto-detect-ckpt-format dist-ckpt-* ckpt-fully-parallel-* no-ckpt-fully-parallel-*
        use-dist-ckpt ckpt-assume-constant-structure use-persistent-ckpt-worker async-strategy save-safetensors
        zero-optimization.stage3-gather-16bit-weights-on-model-save universal-checkpoint
        checkpoint-validation-with-forward-pass""",
    "--load without a checkpoint ends the run; --auto-resume starts it": "exit-on-missing-checkpoint",
    "learning rate and decay are always those that are given": """
        override-opt-param-scheduler use-checkpoint-opt-param-scheduler override-lr-scheduler
        use-checkpoint-lr-scheduler reset-iteration""",
    "a signal ends a run after a save": "exit-signal-handler exit-signal",
    "a NaN is always looked for": """
        check-for-nan-in-loss-and-grad check-for-nan-in-loss no-check-for-nan-in-loss-and-grad rerun-mode""",
    "collectives and layouts are chosen by themselves": """
        distributed-backend ddp-backend backend use-cpu-initialization overlap-grad-reduce overlap-param-gather
        ddp-bucket-size ddp-num-buckets ddp-average-in-collective ddp-bucket-cap-mb ddp-find-unused-parameters
        use-ring-exchange-p2p no-overlap-p2p-communication overlap-p2p-communication*
        no-scatter-gather-tensors-* lazy-mpu-init no-align-param-gather align-param-gather use-tp-pp-dp-mapping
        disable-gloo-process-groups enable-gloo-process-groups nccl-communicator-config-path
        output-layer-parallelism no-pipeline-parallel
        no-async-tensor-model-parallel-allreduce async-tensor-model-parallel-allreduce
        align-grad-reduce delay-grad-reduce clone-scatter-output-in-embedding torch-fsdp2-reshard-after-forward
        use-sharp symmetric-ar-type num-distributed-optimizer-instances high-priority-stream-groups
        sync-tp-duplicated-parameters batch-p2p-communication""",
    "there is one implementation": "use-mcore-models use-legacy-models transformer-impl spec model-type",
    "the same on every layout anyway": """
        deterministic-mode full-determinism calculate-per-token-loss te-rng-tracker data-parallel-random-init""",
    "blocks are recomputed one by one with --recompute": """
        recompute-method recompute-num-layers checkpoint-num-layers checkpoint-method activations-checkpoint-*
        recompute-modules distribute-saved-activations partition-activations contiguous-checkpointing
        synchronize-each-layer checkpoint-in-cpu profile-backward gradient-checkpointing-kwargs""",
    "it is what this program does": """
        do-train pretrain no-use-tokenizer-model-from-checkpoint-args use-tokenizer-model-from-checkpoint-args""",
    "loss and validation loss are shown by --eval-interval": """
        do-eval do-valid eval-strategy evaluation-strategy eval-on-start""",
    "it changes nothing here": """
        manual-gc manual-gc-interval no-manual-gc-eval manual-gc-eval empty-unused-memory-level barrier-with-l1-time
        use-nccl-ub one-logger-* no-one-logger* log-straggler straggler-*
        enable-one-logger app-tag-run-* save-on-each-node log-on-each-node prediction-loss-only
        remove-unused-columns overwrite-output-dir overwrite-cache preprocessing-num-workers adlr-autoresume*
        onnx-safe git-hash include-num-input-tokens-seen ddp-broadcast-buffers ddp-static-graph
        average-tokens-across-devices no-data-sharding""",
    "no random state is kept: all follows from --seed": "no-save-rng no-load-rng",
}

# What is not there. Why, or what to do instead: names.
ABSENT = {
    "--model.rotary-scaling names the rule, --model.rotary-factor how far it reaches": """
        rope-scaling rope-type rope-scaling.* yarn-* no-rope-freq""",
    "no mixture of experts": """
        num-experts num-moe-experts moe-* expert-model-parallel-size expert-tensor-parallel-size
        num-local-experts num-experts-per-tok enable-expert-* topk *-experts""",
    "no sequence or context parallelism; --tp, --recompute and --zero-stage save memory": """
        sequence-parallel context-parallel-size cp-comm-type hierarchical-context-parallel-sizes cp
        ds-sequence-parallel-*""",
    "no interleaved stages; --pp and --partition say how layers are cut": """
        num-layers-per-virtual-pipeline-stage num-virtual-stages-per-pipeline-rank
        virtual-pipeline-model-parallel-size microbatch-group-size-per-virtual-pipeline-stage
        standalone-embedding-stage""",
    "--partition 3,4,4,3 says the blocks of each stage": """
        pipeline-model-parallel-layout decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
        account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
        pipeline-model-parallel-split-rank""",
    "no 8-bit or 4-bit arithmetic; --precision bf16": """
        fp8-* fp8 fp4-* fp4 te-* tf32 first-last-layers-bf16 num-layers-at-*-in-bf16 load-in-8bit load-in-4bit
        use-bnb-optimizer""",
    "no latent attention": """
        multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim
        rotary-scaling-factor mscale mscale-all-dim""",
    "no norm of queries and keys": "qk-layernorm use-qk-layernorm qk-l2-norm qk-norm",
    "biases are of all projections of attention, --model.bias-attention, or of none": "add-qkv-bias qkv-bias",
    "documents of a sample see each other, and their ends are trained on": """
        reset-position-ids reset-attention-mask eod-mask-loss dataloader-inter-document-masking packing""",
    "--data-path with --split": """
        train-data-path valid-data-path test-data-path train-data-paths valid-data-paths test-data-paths
        train-weighted-split-paths per-split-data-args-path data-args-path validation-split-percentage
        *-data-weights""",
    "tools/preprocess_data.py makes a dataset of text, --data-path reads it": """
        validation-file dataset dataset-name dataset-config-name dataset-text-field text-column
        mock-data dataset-path""",
    "tools/checkpoint.py import reads a folder of transformers, --load trains on from it": """
        model-name-or-path model-name pretrained-checkpoint pretrained-model-name-or-path config-name""",
    "a run goes on with its moments; weights alone are what tools/checkpoint.py imports": """
        no-load-optim no-save-optim finetune ignore-data-skip save-only-model load-main-params-from-ckpt
        override-ckpt-*""",
    "--config RUN/config.yaml takes the settings of a run": "use-checkpoint-args use-mp-args-from-checkpoint-args",
    "--train-steps ends a run: tokens of the data / (global batch x context) are one epoch": """
        num-train-epochs train-epochs num-epochs max-epochs""",
    "the number of steps is fixed: --train-steps, with --optim.decay-steps where the schedule is longer": """
        exit-interval start-eval-at-iter skip-train eval-delay""",
    "examples/evaluate.py reads a whole split": """
        full-validation eval-only do-test do-predict test-mode eval-accumulation-steps multiple-validation-sets""",
    "data parallelism takes the processes that --tp and --pp leave": """
        dp data-parallel-size data-parallel n-gpus num-processes world-size dp-size""",
    "it belongs to the launcher, before the program: torchrun or deepspeed": """
        nproc-per-node nnodes node-rank master-addr master-port num-gpus num-nodes hostfile include exclude
        rdzv-* launcher no-ssh-check force-multi deepspeed-mpi deepspeed-slurm gpus devices nodes""",
    "it runs on GPUs where there are any; CUDA_VISIBLE_DEVICES= leaves the CPU": """
        device use-cpu no-cuda cuda gpu cpu mps""",
    "nothing is compiled or captured at the start": """
        torch-compile torch-compile-* compile cuda-graph-* enable-cuda-graph external-cuda-graph""",
    "the losses are the next token's alone": """
        mtp-* fim-* sft sft-* *-lora-* lora-* grpo-* rl-* dpo-* kto-* bert-* mask-prob short-seq-prob
        neftune-noise-alpha group-by-length distill-* kd-*""",
    "layers are attention and MLP": """
        mamba-* hybrid-* is-hybrid-model linear-attention-* gmlp-* heterogeneous-* vision-* img-* patch-dim
        num-channels num-classes retro-* ict-* biencoder-* dino-* swin-*""",
    "--deepspeed-config takes a JSON with fp16.loss_scale and its kin": """
        loss-scale initial-loss-scale min-loss-scale loss-scale-window loss-scale-power hysteresis fp16.*
        dynamic-loss-scale""",
    "--deepspeed-config takes a JSON for it": """
        optimizer-offload-fraction activation-offload-fraction cpu-offloading-* offload-* comms-logger
        flops-profiler autotuning elasticity
        prescale-gradients communication-data-type amp zero-optimization.* zero-allow-untested-optimizer
        zero-reduce-scatter zero-contiguous-gradients zero-reduce-bucket-size zero-allgather-bucket-size""",
    "--debug.check-ranks compares what ranks share": "check-weight-hash-across-dp-replicas-interval",
    "--model.attention says which layer attends to what": "attention-config window-attn-skip-freq",
    "--config takes a file of settings under our names": "yaml-cfg",
    "weights and moments are float32 where they are stepped": """
        use-precision-aware-optimizer main-grads-dtype main-params-dtype exp-avg-dtype exp-avg-sq-dtype""",
    "profiling: docs/debugging.md": """
        profile profile-* use-pytorch-profiler use-nsys-profiler memory-profiling* record-memory-history
        memory-snapshot-path nvtx-ranges""",
    "the folder of --save names the run in W&B": "wandb-exp-name wandb-run-name run-name wandb-name",
    "--log.wandb-project asks for W&B, its own variables for the rest": """
        use-wandb wandb-log wandb-team wandb-group wandb-host wandb-entity wandb-save-dir wandb-init-all-ranks
        use-comet comet-* push-to-hub hub-*""",
    "settings are those of the whole model": """
        decoupled-lr decoupled-min-lr head-lr-mult no-weight-decay-cond-type start-weight-decay end-weight-decay
        weight-decay-incr-style apply-wd-to-qk-layernorm use-mup mup mup-*""",
    "wsd decays by a line; --optim.decay-fraction is its share of the run": "lr-wsd-decay-style lr-wsd-decay-samples",
    "nothing measures it": """
        log-params-norm log-param-norm log-num-zeros-in-grad log-grad-pct-zeros log-max-attention-logit
        log-energy log-optimizer-states log-device-memory-used""",
    "no such residual": "apply-residual-connection-post-layernorm fp32-residual-connection residual-scale*",
    "no such initial weights; --model.init has gpt2, normal, small and fan_in": """
        init-method-xavier-uniform init-model-with-meta-device perform-initialization no-initialization
        embedding-init-method-std""",
    "no such activation; --model.activation has those that there are": """
        quick-geglu glu-linear-offset activation-func-clamp-value softmax-type attention-output-gate""",
    "a tokenizer brings its own": """
        vocab-extra-ids special-tokens tiktoken-* trust-remote-code tokenizer-hf-* tokenizer-prompt-format
        chat-template""",
    "generating is examples/generate.py's": """
        inference-* temperature top-k top-p num-samples text-gen-type maximum-tokens return-log-probs prompt-end
        sample-input-file sample-output-file""",
    "the overlap of products and collectives is not had": """
        tp-comm-* overlap-param-gather-with-optimizer-step defer-embedding-wgrad-compute delay-wgrad-compute
        wgrad-deferral-limit""",
    "--save-interval says when": """
        always-save-checkpoint save-strategy extra-save-iters non-persistent-* save-params-interval""",
}
