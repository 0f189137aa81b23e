# Sets cuda_archs, the architectures to compile for. `80` is machine code for sm_80 (which sm_86 and
# sm_89 run too: nothing in the kernels is for them alone) and PTX that any newer GPU's driver can
# translate; `90a` has Hopper's own instructions, which exist for that one architecture only.
set(cuda_archs ${MOE_OFFLOAD_CUDA_ARCHS})
if(NOT cuda_archs)
  find_program(NVIDIA_SMI nvidia-smi)
  if(NVIDIA_SMI)
    execute_process(
      COMMAND ${NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE capabilities
      ERROR_QUIET
      RESULT_VARIABLE smi_failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
    if(NOT smi_failed)
      foreach(capability ${capabilities})
        string(REPLACE "." "" arch ${capability})
        if(arch EQUAL 90)
          set(arch 90a)
        endif()
        list(APPEND cuda_archs ${arch}-real)
      endforeach()
      list(REMOVE_DUPLICATES cuda_archs)
    endif()
  endif()
endif()
if(NOT cuda_archs)
  set(cuda_archs 80 90a-real)
endif()
message(STATUS "moe_offload: CUDA architectures ${cuda_archs}")
